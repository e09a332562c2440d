"""Seeded damage for files: JSON documents by structure, any file by its bytes, ONNX graphs by their messages.

Every function takes a ``random.Random`` and the file, and changes the file in place. Used by ``scripts/mutate.py``.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

_DEEP, _TWICE = "@@DEEP@@", "@@TWICE@@"
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**9, 10**100, -(10**30)),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "x",
        "0",
        "nan",
        "\x1b[31mred\x1b[0m",
        "\x9b2J",
        "\ud800",
        "\u202eabc",
        "a\x00b",
        "[/b]",
        "@team #1",
        "\n" * 50,
    ),
    *("../../etc/passwd", "/dev/zero", "/proc/self/mem", "a" * 100_000, "é" * 300, _DEEP),
    *([], {}, [[]], [{}], {"": 1}, [1] * 1000, {str(number): number for number in range(1000)}, ["x" * 10_000] * 20),
)
"""What a value is replaced by: other types, numbers beyond every limit, text that steers terminals or leads elsewhere."""


def mutate_json(rng: random.Random, path: Path) -> None:
    """One to three changes of the structure; rarely, a document that is something else."""
    data = json.loads(path.read_text(encoding="utf-8"))
    twice = ""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(data))
        if not places or rng.random() < 0.02:
            data = copy.deepcopy(rng.choice(VALUES))
            continue
        twice = _change(rng, *rng.choice(places)) or twice
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5)
    text = text.replace(f'"{_DEEP}"', "[" * 50_000 + "]" * 50_000)
    if twice:
        text = text.replace(f'{json.dumps(twice)}: "{_TWICE}"', f"{json.dumps(twice)}: 1, {json.dumps(twice)}: 2")
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of every value below ``data``."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield data, key
        yield from _places(value)


def _change(rng: random.Random, container: Any, key: Any) -> str | None:
    """Changes one value; returns a key that is to stand twice."""
    value = container[key]
    kind = rng.randrange(10)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[rng.choice((key.upper(), key + " ", f"\x1b[1m{key}", "\ud800", "", "x" * 70_000))] = container.pop(
            key
        )
    elif kind == 2 and isinstance(container, dict):
        container[key] = _TWICE
        return str(key)
    elif kind == 3 and isinstance(container, list):
        container[key:key] = [copy.deepcopy(value) for _ in range(rng.choice((1, 2, 1000)))]
    elif kind == 4 and type(value) in (int, float):
        container[key] = rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value * 10**9, value / 3))
    elif kind == 5 and isinstance(value, str):
        container[key] = rng.choice(
            (value[:-1], value + "\x1b[2J", value * 2, value[::-1], value.upper(), "../" + value)
        )
    elif kind == 6:
        other = rng.choice(list(_places(container)))
        container[key] = copy.deepcopy(other[0][other[1]])
    else:
        container[key] = copy.deepcopy(rng.choice(VALUES))
    return None


def mutate_bytes(rng: random.Random, path: Path) -> None:
    """One to four changes of bytes: flipped bits, another byte, a part cut out, put in, repeated or zeroed; or cut short."""
    raw = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, length = rng.randrange(len(raw) + 1), rng.choice((1, 2, 8, 100, 5000))
        kind = rng.randrange(7)
        if kind == 0 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(raw):
            raw[at] = rng.choice((0, 0x1B, 0x22, 0x5C, 0x7B, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del raw[at : at + length]
        elif kind == 3:
            raw[at:at] = rng.randbytes(length)
        elif kind == 4:
            raw[at:at] = raw[at : at + length] * rng.choice((1, 3, 50))
        elif kind == 5:
            raw[at : at + length] = bytes(len(raw[at : at + length]))
        else:
            del raw[at:]
    path.write_bytes(raw)


def replace_file(rng: random.Random, path: Path) -> None:
    """Something else under the file's name: nothing, a folder, a pipe, an endless device, 3 GB of holes."""
    kind = rng.randrange(7)
    path.unlink()
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4:
        path.write_bytes(b"")
    elif kind == 5:
        with path.open("wb") as stream:
            stream.truncate(3 << 30)


def mutate_header(rng: random.Random, path: Path) -> None:
    """A safetensors file whose JSON header is changed; its length field fits, mostly."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = path.with_suffix(".header")
    header.write_bytes(raw[8 : 8 + length])
    (mutate_bytes if rng.random() < 0.25 else mutate_json)(rng, header)
    new = header.read_bytes()
    header.unlink()
    field = len(new) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(new) + 1))
    path.write_bytes(field.to_bytes(8, "little") + new + raw[8 + length :])


_PADDING = {"direction": "Right", "pad_id": 3, "pad_type_id": 0, "pad_token": "x"}
_CUT = {"direction": "Left", "max_length": 1}
_TEMPLATE = {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {}}
TOKENIZER_SETTINGS: tuple[tuple[str, Any], ...] = (
    ("padding", {**_PADDING, "strategy": {"Fixed": 10**9}, "pad_to_multiple_of": None}),
    ("padding", {**_PADDING, "strategy": "BatchLongest", "pad_to_multiple_of": 10**9}),
    ("truncation", {**_CUT, "strategy": "OnlySecond", "stride": 0}),
    ("truncation", {**_CUT, "strategy": "OnlyFirst", "stride": 5}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAAAAA="}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "(.*)*x"}, "content": "a" * 100_000}),
    ("normalizer", {"type": "Prepend", "prepend": "a" * 10_000}),
    ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    ("post_processor", {**_TEMPLATE, "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]}),
    ("post_processor", {**_TEMPLATE, "single": [{"Sequence": {"id": "B", "type_id": 0}}]}),
    ("model", {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}),
    ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "missing"}),
    ("decoder", {"type": "Strip", "content": "x", "start": 10**9, "stop": 10**9}),
)
"""Settings that pad a prompt a billion times, or make the Rust code of the tokenizer library panic."""


def mutate_tokenizer(rng: random.Random, path: Path) -> None:
    """One of :data:`TOKENIZER_SETTINGS`."""
    key, value = rng.choice(TOKENIZER_SETTINGS)
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")


SNIPPETS = (
    "{{ 'a' * 10**9 }}",
    "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ raise_exception('\x1b[31mno') }}",
    "{{ 7 ** 7 ** 7 ** 7 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ undefined.x.y }}",
    "{% include 'x' %}",
    "{{ '\x1b[2J' }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{% if " + "(" * 3000 + "1" + ")" * 3000 + " %}{% endif %}",
    "{% macro a() %}x{% endmacro %}" * 3000,
    "{{ '\\ud800' }}",
    "{% set x = [] %}{% set x = [x, x] %}" * 40,
)
"""Jinja that wastes time or memory, or reaches for what a template may not have."""


def mutate_template(rng: random.Random, path: Path) -> None:
    """A Jinja template with words dropped, doubled or swapped, or with a hostile snippet."""
    text = path.read_text(encoding="utf-8")
    if rng.random() < 0.5:
        at = rng.randrange(len(text) + 1)
        text = rng.choice((text[:at] + rng.choice(SNIPPETS) + text[at:], rng.choice(SNIPPETS)))
    else:
        words = text.split(" ")
        for _ in range(rng.randrange(1, 4)):
            at, other = rng.randrange(len(words)), rng.randrange(len(words))
            words[at : at + 1] = rng.choice(
                ([], [words[at]] * 2, [words[other]], ["{{"], ["%}"], ["not"], ["999999999"])
            )
            words = words or [""]
        text = " ".join(words)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


# ---- ONNX -------------------------------------------------------------------------------------------------------


def mutate_graph(rng: random.Random, path: Path) -> None:
    """One to three changes of an ONNX model's messages."""
    model = onnx.load(str(path), load_external_data=False)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(_GRAPH_CHANGES)(rng, model)
    path.write_bytes(model.SerializeToString())


def _nodes(rng: random.Random, model: onnx.ModelProto) -> Any:
    """The nodes of the graph, or of one of its functions."""
    return rng.choice((model.graph, model.graph, *model.functions)).node


def _drop_node(rng: random.Random, model: onnx.ModelProto) -> None:
    nodes = _nodes(rng, model)
    if len(nodes):
        del nodes[rng.randrange(len(nodes))]


def _double_node(rng: random.Random, model: onnx.ModelProto) -> None:
    nodes = _nodes(rng, model)
    if len(nodes):
        nodes.add().CopyFrom(rng.choice(nodes))


def _rename(rng: random.Random, model: onnx.ModelProto) -> None:
    nodes = _nodes(rng, model)
    if not len(nodes):
        return
    node, other = rng.choice(nodes), rng.choice(nodes)
    names = [*node.input, *node.output, *other.output]
    new = rng.choice((*names, "", "\x1b[31mx", "é", "x" * 10_000))
    kind = rng.randrange(5)
    if kind == 0:
        node.op_type = rng.choice((other.op_type, "", "Nope", "If", "\x1b[1m"))
    elif kind == 1:
        node.domain = rng.choice(("", "ai.onnx", "com.microsoft", "llama_export", "\x1b[1m"))
    elif kind == 2 and len(node.input):
        node.input[rng.randrange(len(node.input))] = new
    elif kind == 3 and len(node.output):
        node.output[rng.randrange(len(node.output))] = new
    else:
        node.name = new


_INTS = (0, -1, 1, 7, 2**31 - 1, 2**31, 2**62, -(2**63), 10**9)


def _attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    with_attributes = [node for node in _nodes(rng, model) if len(node.attribute)]
    if not with_attributes:
        return
    node = rng.choice(with_attributes)
    at = rng.randrange(len(node.attribute))
    attribute = node.attribute[at]
    kind = rng.randrange(5)
    if kind == 0:
        del node.attribute[at]
    elif kind == 1:
        node.attribute.add().CopyFrom(attribute)
    elif kind == 2:
        attribute.type = rng.randrange(0, 15)
    elif attribute.HasField("t"):
        _change_tensor(rng, attribute.t)
    elif attribute.HasField("i"):
        attribute.i = rng.choice(_INTS)
    elif attribute.HasField("f"):
        attribute.f = rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    else:
        attribute.CopyFrom(helper.make_attribute(attribute.name, rng.choice(([1, -1], 3, 0.5, "x", [2**40] * 4))))


def _change_tensor(rng: random.Random, tensor: onnx.TensorProto) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        del tensor.dims[:]
        tensor.dims.extend(rng.choice(_INTS) for _ in range(rng.randrange(4)))
    elif kind == 1:
        tensor.data_type = rng.randrange(0, 26)
    elif kind == 2 and len(tensor.raw_data):
        tensor.raw_data = rng.choice(_INTS).to_bytes(8, "little", signed=True) * (len(tensor.raw_data) // 8 or 1)
    elif kind == 2 and len(tensor.int64_data):
        tensor.int64_data[0] = rng.choice(_INTS)
    else:
        tensor.raw_data = rng.randbytes(rng.randrange(40))


def _initializer(rng: random.Random, model: onnx.ModelProto) -> None:
    items = model.graph.initializer
    if not len(items):
        return
    item = rng.choice(items)
    if not len(item.external_data) or rng.random() < 0.3:
        _change_tensor(rng, item)
        return
    entry = rng.choice(item.external_data)
    entry.value = rng.choice(
        (
            *("", "-1", "0", "1", "x", "1e3", "0x10", " 8", str(2**63), str(2**64), str(2**31), "3000000000"),
            *("../../etc/passwd", "/dev/zero", "config.json", "model.safetensors", "\x1b[31m", "9" * 5000),
            *(str(int(entry.value) + delta) for delta in (-8, 1, 4096) if entry.value.isdigit()),
        )
    )


def _shape(rng: random.Random, model: onnx.ModelProto) -> None:
    value = rng.choice((*model.graph.input, *model.graph.output, *model.graph.value_info))
    kind = rng.randrange(4)
    dims = value.type.tensor_type.shape.dim
    if kind == 0 and len(dims):
        rng.choice(dims).dim_value = rng.choice(_INTS)
    elif kind == 1 and len(dims):
        rng.choice(dims).dim_param = rng.choice(("", "other", "\x1b[31m", "batch_size"))
    elif kind == 2:
        value.type.tensor_type.elem_type = rng.randrange(0, 26)
    else:
        value.name = rng.choice(("", "other", "\x1b[31m", model.graph.output[0].name))


def _function(rng: random.Random, model: onnx.ModelProto) -> None:
    functions = model.functions
    if not len(functions):
        return
    at = rng.randrange(len(functions))
    function = functions[at]
    call = helper.make_node(function.name, list(function.input), list(function.output), domain=function.domain)
    kind = rng.randrange(5)
    if kind == 0:
        del functions[at]
    elif kind == 1:
        functions.add().CopyFrom(function)
    elif kind == 2:  # it calls itself
        function.node.insert(0, call)
    elif kind == 3:  # a chain in which every function calls the next one twice: 2^depth calls
        name, domain, inputs, outputs = function.name, function.domain, list(function.input), list(function.output)
        for depth in range(rng.choice((3, 40))):
            link = functions.add()
            link.CopyFrom(function)
            link.name = f"{name}_{depth}"
            del link.node[:]
            below = name if depth == 0 else f"{name}_{depth - 1}"
            unused = [f"unused_{output}" for output in outputs]
            link.node.add().CopyFrom(helper.make_node(below, inputs, unused, domain=domain))
            link.node.add().CopyFrom(helper.make_node(below, inputs, outputs, domain=domain))
        for node in model.graph.node:
            if node.op_type == name:
                node.op_type = f"{name}_{depth}"
    else:
        function.domain = rng.choice(("", "other", "\x1b[31m"))


def _header(rng: random.Random, model: onnx.ModelProto) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        model.ir_version = rng.choice(_INTS)
    elif kind == 1 and len(model.opset_import):
        rng.choice(model.opset_import).version = rng.choice(_INTS)
    elif kind == 2 and len(model.opset_import):
        del model.opset_import[rng.randrange(len(model.opset_import))]
    else:
        model.producer_name = "\x1b[31m" * rng.choice((1, 100_000))


_GRAPH_CHANGES: tuple[Callable[[random.Random, onnx.ModelProto], None], ...] = (
    _drop_node, _double_node, _rename, _rename, _attribute, _attribute, _initializer, _initializer, _shape, _function, _header,
)  # fmt: skip
