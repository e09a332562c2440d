"""Graphs that somebody changed, with hashes made to fit: each is refused before a library sees it; what an export makes passes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import TINY
from onnx import TensorProto, helper, numpy_helper
from random_llama import write_random_checkpoint
from support import make_special, refused_or, trace_once

from llama_export.bundle import graph_check
from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.bundle.graph_check import check_graph
from llama_export.cli.main import main
from llama_export.config.llama import TASKS
from llama_export.config.settings import EngineConfig, ExportConfig
from llama_export.engine import build as engine
from llama_export.engine.build import build_engine
from llama_export.engine.tensorrt import MappedWeights
from llama_export.errors import ArtifactMismatchError, LlamaExportError, ToolchainError
from llama_export.export.export import export_checkpoint
from llama_export.export.quantize import quantize_bundle
from llama_export.parity.validate import validate_bundle
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession

GRAPHS = ("model.onnx", "model.onnxruntime.onnx")
Fault = Callable[[onnx.ModelProto], object]


@pytest.fixture(scope="module")
def quantized(tiny_bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A float32 bundle with an int4 variant, not to be modified."""
    folder = tmp_path_factory.mktemp("graph_check") / "bundle"
    shutil.copytree(tiny_bundles["float32"].folder, folder)
    quantize_bundle(load_bundle(folder), "int4")
    return load_bundle(folder)


@pytest.fixture
def bundle(quantized: Bundle, tmp_path: Path) -> Bundle:
    """The same, of the test's own."""
    return load_bundle(Path(shutil.copytree(quantized.folder, tmp_path / "bundle")))


def tamper(bundle: Bundle, name: str, fault: Fault) -> Bundle:
    """Changes a graph and every hash of it, and opens the bundle again."""
    path = bundle.folder / name
    model = onnx.load(str(path), load_external_data=False)
    fault(model)
    path.write_bytes(model.SerializeToString())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    for entry in (*manifest["functions"].values(), *manifest["quantized"].values()):
        if entry["file"] == name:
            entry["sha256"] = digest
            entry.update(size=path.stat().st_size) if "size" in entry else None
    manifest["graph_sha256"] = manifest["functions"]["standard"]["sha256"]
    for entry in manifest["quantized"].values():
        entry["source_sha256"] = manifest["functions"]["onnxruntime"]["sha256"]
    (bundle.folder / "manifest.json").write_text(json.dumps(manifest))
    return load_bundle(bundle.folder)


# ---- faults -----------------------------------------------------------------------------------------------------


def external(model: onnx.ModelProto, at: int = 1) -> TensorProto:
    return [item for item in model.graph.initializer if item.external_data][at]


def inside(model: onnx.ModelProto) -> TensorProto:
    return next(item for item in model.graph.initializer if not item.external_data)


def place(**values: str) -> Fault:
    """Sets ``location``, ``offset`` or ``length`` of a weight."""

    def change(model: onnx.ModelProto) -> None:
        for item in external(model).external_data:
            item.value = values.get(item.key, item.value)

    return change


def another_tensor(model: onnx.ModelProto) -> None:
    """Two weights of one shape change places."""
    by_name = {item.name: item for item in model.graph.initializer}
    norms = [by_name[f"model.layers.0.{name}_layernorm.weight"] for name in ("input", "post_attention")]
    left, right = (next(entry for entry in item.external_data if entry.key == "offset") for item in norms)
    left.value, right.value = right.value, left.value


def another_shape(model: onnx.ModelProto) -> None:
    """As many elements, in another order."""
    tensor = next(item for item in model.graph.initializer if item.name == "model.embed_tokens.weight")
    tensor.dims[:] = tensor.dims[::-1]


def add_to_logits(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    """Makes what the last of these nodes computes part of the result."""
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "right"
    for at, node in enumerate(nodes):
        model.graph.node.insert(at, node)
    model.graph.node.insert(len(nodes), helper.make_node("ReduceMax", [nodes[-1].output[0]], ["largest"], keepdims=0))
    model.graph.node.append(helper.make_node("Add", ["right", "largest"], ["logits"]))


def shape(model: onnx.ModelProto, *sizes: int) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), "size"))


def eight_gigabytes(model: onnx.ModelProto) -> None:
    shape(model, 1 << 31)
    add_to_logits(model, helper.make_node("ConstantOfShape", ["size"], ["large"]))


def doubled(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1024, np.float32), "d0"))
    add_to_logits(model, *(helper.make_node("Concat", [f"d{i}"] * 2, [f"d{i + 1}"], axis=0) for i in range(24)))


def outer_product(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1 << 13, 1), np.float32), "a"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 1 << 13), np.float32), "b"))
    add_to_logits(model, helper.make_node("Mul", ["a", "b"], ["large"]))


def long_range(model: onnx.ModelProto) -> None:
    values = {"from": 0, "to": 1 << 40, "by": 1}
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    add_to_logits(
        model, helper.make_node("Range", [*values], ["count"]), helper.make_node("Cast", ["count"], ["large"], to=1)
    )


def expanded(model: onnx.ModelProto) -> None:
    """The size is a constant, what is expanded is not."""
    shape(model, 1 << 20, 1 << 14)
    cast = helper.make_node("Cast", ["past_length"], ["float"], to=1)
    add_to_logits(model, cast, helper.make_node("Expand", ["float", "size"], ["large"]))


def many_casts(model: onnx.ModelProto) -> None:
    """Each is as small as a weight: in sum they are not."""
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1 << 19, np.float32), "d0"))
    add_to_logits(model, *(helper.make_node("Cast", [f"d{i}"], [f"d{i + 1}"], to=1) for i in range(60)))


def in_a_function(model: onnx.ModelProto) -> None:
    """The constant is outside the function, what grows it inside."""
    shape(model, 1 << 31)
    function = model.functions.add(name="Grow", domain="llama_export", input=["n"], output=["x"])
    function.node.append(helper.make_node("ConstantOfShape", ["n"], ["x"]))
    function.opset_import.append(helper.make_opsetid("", 23))
    add_to_logits(model, helper.make_node("Grow", ["size"], ["large"], domain="llama_export"))


def calls(model: onnx.ModelProto, callee: int) -> None:
    """The first function is nothing but a call of another one, or of itself."""
    first, called = model.functions[0], model.functions[callee]
    del first.node[:]
    node = helper.make_node(called.name, list(first.input), list(first.output), domain=called.domain)
    first.node.append(node)
    first.opset_import.append(helper.make_opsetid(called.domain, 1))


def claims(model: onnx.ModelProto) -> None:
    """A tensor of 8 GB, without its bytes."""
    model.graph.initializer.append(TensorProto(name="large", data_type=1, dims=[1 << 31]))


def subgraph(model: onnx.ModelProto) -> None:
    graph = helper.make_graph([], "then", [], [helper.make_tensor_value_info("y", 1, None)])
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=graph, else_branch=graph))


def constant_outside(model: onnx.ModelProto) -> None:
    value = TensorProto(name="v", data_type=1, dims=[1], data_location=1)
    value.external_data.add(key="location", value="model.safetensors")
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=value))


FAULTS: dict[str, tuple[Fault, str]] = {
    "offset past the end": (place(offset=str(1 << 40)), "within the 379856 bytes of `model.safetensors`"),
    "end past the end": (place(offset="379700"), "within the 379856 bytes"),
    "negative offset": (place(offset="-4096"), "'-4096'"),
    "an offset that is no number": (place(offset="abc"), "'abc'"),
    "digits of another script": (place(offset="١٢"), "decimal number"),
    "an offset of many digits": (place(offset="9" * 900), "at most 18 digits"),
    "another length": (place(length="8"), "bytes for its dtype and shape"),
    "no length": (lambda m: external(m).external_data.pop(), "location, offset and length"),
    "two offsets": (lambda m: external(m).external_data.add(key="offset", value="0"), "each once"),
    "an unknown key": (lambda m: external(m).external_data.add(key="checksum", value="0"), "`checksum`"),
    "a path": (place(location="../../etc/passwd"), "the file `../../etc/passwd`"),
    "an address": (place(location="*/_ORT_MEM_ADDR_/*"), "_ORT_MEM_ADDR_"),
    "a file that is not of the manifest": (place(location="config.json"), "the file `config.json`"),
    "another tensor's place": (another_tensor, "as in the header of `model.safetensors`"),
    "another shape": (another_shape, "as in the header"),
    "another name": (lambda m: setattr(external(m), "name", "renamed"), "no such tensor"),
    "outside without a place": (lambda m: setattr(inside(m), "data_location", 1), "data location 1"),
    "a place without outside": (lambda m: setattr(external(m), "data_location", 0), "data location 0"),
    "data in both places": (lambda m: setattr(external(m), "raw_data", b"1234"), "inside and outside"),
    "data of another length": (lambda m: setattr(inside(m), "raw_data", b"1234"), "bytes for its dtype and shape"),
    "a claim of 8 GB": (claims, "0 bytes of numbers"),
    "negative dimensions": (lambda m: external(m).dims.append(-1), "none negative"),
    "dimensions beyond all": (lambda m: external(m).dims.extend([1 << 40] * 3), "fewer than 2^60"),
    "strings as data": (lambda m: setattr(inside(m), "data_type", 8), "data type 8"),
    "one name twice": (lambda m: m.graph.initializer.append(external(m)), "one name twice"),
    "a constant outside the graph": (constant_outside, "an attribute outside the graph"),
    "a constant of 8 GB": (eight_gigabytes, "ConstantOfShape"),
    "a constant doubled 24 times": (doubled, "2097152 elements"),
    "an outer product": (outer_product, "67108864 elements"),
    "a long range": (long_range, "1099511627776 elements"),
    "an expansion to a constant size": (expanded, "a large or unknown constant"),
    "many casts of one constant": (many_casts, "elements made of constants"),
    "a constant that a function grows": (in_a_function, "ConstantOfShape"),
    "a function that calls itself": (lambda m: calls(m, 0), "a call of `llama_export::LlamaRMSNorm`"),
    "a function that calls another": (lambda m: calls(m, 1), "a call of `llama_export::LlamaAddRMSNorm`"),
    "one function twice": (lambda m: m.functions.append(m.functions[0]), "twice"),
    "a function of another domain": (lambda m: setattr(m.functions[0], "domain", "com.microsoft"), "com.microsoft::LlamaRMSNorm"),
    "a function that is not there": (lambda m: m.functions.pop(0), "no such function"),
    "a subgraph": (subgraph, "field 6"),
    "a sparse tensor": (lambda m: m.graph.sparse_initializer.add(), "field 15"),
    "training": (lambda m: m.training_info.add(), "field 20"),
    "an escape sequence": (lambda m: setattr(m.graph.node[3], "name", "a\x1b[31mred"), "\\x1b[31mred"),
    "a name of a megabyte": (lambda m: setattr(m.graph.node[3], "name", "x" * 10**6), "a name of 1000000 bytes"),
    "no inputs": (lambda m: m.graph.node[3].ClearField("input"), "no inputs"),
    "too many nodes": (lambda m: m.graph.node.extend(helper.make_node("Abs", ["logits"], [str(n)]) for n in range(400)), "at most 384"),
    "too many tensors": (lambda m: m.graph.initializer.extend(TensorProto(name=f"n{n}", data_type=1, dims=[0]) for n in range(200)), "at most 128"),
    "a missing output": (lambda m: m.graph.output.pop(), "present.1.value"),
    "a renamed input": (lambda m: setattr(m.graph.input[1], "name", "zzz"), "past_length, zzz"),
    "an input twice": (lambda m: m.graph.input.append(m.graph.input[0]), "one twice"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_in_every_graph(fault: str, bundle: Bundle) -> None:
    change, message = FAULTS[fault]
    for name in (*GRAPHS, "model.onnxruntime.int4.onnx"):
        opened = tamper(bundle, name, change)
        with pytest.raises(ArtifactMismatchError) as caught:
            check_graph(opened, opened.folder / name)
        assert message in str(caught.value), caught.value
        assert len(str(caught.value)) < 2000
        assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [(place(location="model.onnxruntime.int4.data"), "the file `model.onnxruntime.int4.data`")],
    ids=["data of a variant"],
)
def test_only_a_variant_reads_its_own_file(change: Fault, message: str, bundle: Bundle) -> None:
    opened = tamper(bundle, "model.onnxruntime.onnx", change)
    with pytest.raises(ArtifactMismatchError) as caught:
        check_graph(opened, opened.onnxruntime_path)
    assert message in str(caught.value)


def test_a_packed_tensor_must_lie_within_its_file(bundle: Bundle) -> None:
    def past_the_end(model: onnx.ModelProto) -> None:
        tensor = next(item for item in model.graph.initializer if item.name.endswith(".int4"))
        next(item for item in tensor.external_data if item.key == "offset").value = "9999999"

    opened = tamper(bundle, "model.onnxruntime.int4.onnx", past_the_end)
    with pytest.raises(ArtifactMismatchError, match=r"of `model\.onnxruntime\.int4\.data`"):
        OnnxRuntimeSession(opened, max_seq_len=8, variant="int4")


# ---- every way in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["offset past the end", "a function that calls itself", "an offset that is no number", "a constant of 8 GB"])  # fmt: skip
def test_build_ends_with_a_sentence_where_it_crashed(fault: str, bundle: Bundle) -> None:
    """The first two were segmentation faults, the third a traceback, the last one was killed for memory."""
    pytest.importorskip("tensorrt_rtx_bindings")
    tamper(bundle, "model.onnx", FAULTS[fault][0])
    done = subprocess.run(
        [sys.executable, "-m", "llama_export", "build", bundle.folder, "--ops", "native", "--max-seq-len", "48"],
        capture_output=True, text=True, timeout=120, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "error: `model.onnx` is not a graph that an export makes" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (bundle.folder / "engines").exists()


WRONG_PLACES = [
    fault for fault in FAULTS if "offset" in fault or "end" in fault or "length" in fault or "place" in fault
]


@pytest.mark.parametrize("weights", ["constant", "input"])
@pytest.mark.parametrize("fault", WRONG_PLACES)
def test_no_wrong_place_reaches_tensorrt(
    fault: str, weights: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine of such a graph held memory of the process that built it."""
    opened = tamper(bundle, "model.onnx", FAULTS[fault][0])

    def called(*_: object) -> None:
        pytest.fail("TensorRT was called")

    library = SimpleNamespace(__version__="1.7.1.1", ILogger=object, Builder=called)
    monkeypatch.setattr(engine, "load_backend", lambda backend: library)
    monkeypatch.setattr(engine, "message_log", called)
    monkeypatch.setattr(engine, "MappedWeights", called)
    with pytest.raises(ArtifactMismatchError, match="is not a graph that an export makes"):
        build_engine(opened, EngineConfig(ops="native", max_seq_len=48, weights=weights))


@pytest.mark.parametrize(("key", "value"), [("offset", str(1 << 40)), ("offset", "-1"), ("length", "-1"), ("length", str(1 << 40))])  # fmt: skip
def test_no_address_is_made_outside_a_mapped_file(key: str, value: str, bundle: Bundle) -> None:
    """Again at the place where a number becomes an address, whoever made the graph."""
    model = onnx.load(str(bundle.model_path), load_external_data=False)
    place(**{key: value})(model)
    weights = MappedWeights(bundle.folder, model)
    with pytest.raises(ArtifactMismatchError, match="does not lie within its file"):
        list(weights.addresses())


def test_every_command_that_opens_a_graph_checks_it(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    for name in GRAPHS:
        tamper(bundle, name, FAULTS["a function that calls itself"][0])
    for argv in (
        ["run", bundle.folder, "--tokens", "1"],
        ["bench", bundle.folder, "--prompt-tokens", "4", "--new-tokens", "4"],
        ["validate", bundle.folder],
        ["quantize", bundle.folder, "--type", "int8"],
    ):
        assert main([str(argument) for argument in argv]) == 2, argv
        err = capsys.readouterr().err
        assert "is not a graph that an export makes" in err, (argv, err)
        assert "Traceback" not in err


def test_validate_judges_a_graph_that_reads_another_tensor_by_its_numbers(bundle: Bundle) -> None:
    """It reads weights within their files; a session that trusts the header refuses the same graph."""
    opened = tamper(bundle, "model.onnx", another_tensor)
    check_graph(opened, opened.model_path, by_header=False)
    with pytest.raises(ArtifactMismatchError):
        validate_bundle(tamper(opened, "model.onnx", place(offset="379700")))


def test_onnxruntime_writes_nothing_itself(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    """Its log has colours, and names from the file, whatever steers a terminal is in them."""

    def fails_in_a_run(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "Concat").attribute[0].i = -(1 << 60)

    session = OnnxRuntimeSession(tamper(bundle, "model.onnxruntime.onnx", fails_in_a_run), max_seq_len=8)
    with pytest.raises(ToolchainError, match="onnxruntime cannot run this bundle") as caught:
        session.step([[1, 2]])
    assert "model/Concat" in str(caught.value)
    assert capfd.readouterr() == ("", "")


# ---- bytes ------------------------------------------------------------------------------------------------------


def _replaced(model: bytes, old: bytes, new: bytes) -> bytes:
    assert old in model
    return model.replace(old, new, 1)


def type_of(raw: bytes) -> bytes:
    """The type of an input: its dtype, and the shape that begins behind the two bytes of it."""
    return onnx.ModelProto.FromString(raw).graph.input[1].type.SerializeToString()


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda raw: b"", "0 bytes"),
    "text": (lambda raw: b"this is no model", "field 14 of wire type 4"),
    "half of it": (lambda raw: raw[: len(raw) // 2], "bytes"),
    "two models": (lambda raw: raw * 2, "twice"),
    "a second graph": (lambda raw: raw + b"\x3a\x02\x12\x00", "field 7 of a model twice"),
    "an unknown field": (lambda raw: raw + b"\xa2\x1f\x00", "field 500"),
    "a group": (lambda raw: raw + b"\x3b", "wire type 3"),
    "an endless number": (lambda raw: raw + b"\x42" + b"\xff" * 11, "a broken number"),
    "a number that ends in nothing": (lambda raw: raw + b"\x42\xff", "a broken number"),
    "a type that is cut off": (lambda raw: _replaced(raw, type_of(raw), type_of(raw)[:2] + b"\xff" * (len(type_of(raw)) - 2)), "byte"),
    "an opset that is cut off": (lambda raw: raw + b"\x42\x02\x0a\x7f", "at most 0 bytes"),
    "metadata that is cut off": (lambda raw: raw + b"\x72\x02\x0a\x7f", "at most 0 bytes"),
    "a length beyond the file": (lambda raw: raw + b"\x42\xff\xff\xff\xff\x0f", "at most 0 bytes"),
    "a name that is not UTF-8": (lambda raw: _replaced(raw, b"model.norm.weight", b"model.norm.wei\xff\xff\xff"), "not UTF-8"),
    "too large": (lambda raw: raw + bytes(5 << 20), "for this config"),
}  # fmt: skip


@pytest.mark.parametrize("what", BYTES)
def test_bytes_that_are_no_graph_are_refused(what: str, bundle: Bundle) -> None:
    change, message = BYTES[what]
    bundle.model_path.write_bytes(change(bundle.model_path.read_bytes()))
    with pytest.raises(ArtifactMismatchError) as caught:
        check_graph(bundle, bundle.model_path)
    assert message in str(caught.value), caught.value


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(kind: str, bundle: Bundle) -> None:
    bundle.model_path.unlink()
    make_special(bundle.model_path, kind)
    with pytest.raises(ArtifactMismatchError, match="cannot be read"):
        check_graph(bundle, bundle.model_path)


def test_a_file_that_became_shorter_is_refused_before_it_is_mapped(bundle: Bundle) -> None:
    """onnxruntime maps it; a read behind the end would be a bus error."""
    os.truncate(bundle.folder / "model.onnxruntime.int4.data", 8192)
    with pytest.raises(ArtifactMismatchError, match="within the 8192 bytes"):
        OnnxRuntimeSession(bundle, max_seq_len=8, variant="int4")


TRUNCATED_WHILE_OPEN = """
import os, sys
from pathlib import Path
from llama_export.bundle.bundle import load_bundle
from llama_export.runtime.opening import open_session
folder, variant, read = Path(sys.argv[1]), sys.argv[2] or None, sys.argv[3] == "read"
session = open_session(load_bundle(folder), backend="onnxruntime", quantize=variant, max_seq_len=16, read_weights=read)
before = session.step([[1, 2, 3]])
session.reset()
for path in (*folder.glob("*.safetensors"), *folder.glob("*.data")):
    os.truncate(path, 0)
print((session.step([[1, 2, 3]]) == before).all())
"""


@pytest.mark.parametrize(
    ("how", "variant", "code", "said"),
    [("read", "", 0, "True"), ("read", "int4", 0, "True"), ("map", "", -signal.SIGBUS, "")],
)
def test_weights_that_were_read_outlive_their_files(
    how: str, variant: str, code: int, said: str, bundle: Bundle
) -> None:
    """Where they are mapped, the process is killed: that is why there is a choice."""
    argv = [sys.executable, "-c", TRUNCATED_WHILE_OPEN, bundle.folder, variant, how]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (code, said), done.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_that_were_read_give_the_same_bits(dtype: str, tiny_bundles: dict[str, Bundle]) -> None:
    sessions = [OnnxRuntimeSession(tiny_bundles[dtype], max_seq_len=8, read_weights=read) for read in (False, True)]
    mapped, read = (session.step([[1, 2, 3]]) for session in sessions)
    np.testing.assert_array_equal(mapped, read)


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, doubled or inserted."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, size = rng.randrange(len(data)), rng.choice((1, 1, 2, 8, 200))
        how = rng.randrange(4)
        if how == 0:
            data[at : at + size] = rng.randbytes(size)
        elif how == 1:
            del data[at : at + size]
        elif how == 2:
            data[at:at] = data[at : at + size]
        else:
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_random_changes_pass_or_are_refused(count: int, bundle: Bundle) -> None:
    raw = {name: (bundle.folder / name).read_bytes() for name in (*GRAPHS, "model.onnxruntime.int4.onnx")}
    rng, refused, slowest = random.Random(count), 0, 0.0
    for number in range(count):
        path = bundle.folder / list(raw)[number % len(raw)]
        path.write_bytes(mutated(raw[path.name], rng))
        start = time.process_time()

        def check(path: Path = path) -> bool:
            check_graph(bundle, path)
            return True

        refused += refused_or(check) is None
        slowest = max(slowest, time.process_time() - start)
    assert refused > 0.7 * count
    assert slowest < 2


# ---- what an export makes passes --------------------------------------------------------------------------------


def check_all(folder: Path) -> None:
    opened = load_bundle(folder)
    paths = sorted(folder.glob("*.onnx"))
    assert len(paths) >= 2
    for path in paths:
        check_graph(opened, path)


def test_every_dtype_and_variant_passes(tiny_bundles: dict[str, Bundle], quantized: Bundle) -> None:
    for item in (*tiny_bundles.values(), quantized):
        check_all(item.folder)


SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "onnx_table.py"))
CASES = [(task, rope, dtype) for task in TASKS for rope in SCRIPT["ROPE"] for dtype in ("float32", "bfloat16")]
QUICK = {
    ("causal-lm", "dynamic", "float32"),
    ("feature-extraction", "longrope", "bfloat16"),
}  # test_head_stages has the rest


@pytest.mark.parametrize(
    ("task", "rope", "dtype"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id="-".join(case)) for case in CASES],
)
def test_every_task_and_rope_type_passes(task: str, rope: str, dtype: str, tmp_path: Path) -> None:
    SCRIPT["write_checkpoint"](tmp_path / "checkpoint", task, rope)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", ExportConfig(dtype=dtype))
    check_all(tmp_path / "out")


def test_weights_inside_the_graph_pass(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_once(monkeypatch)
    export_checkpoint(tiny_checkpoint, tmp_path / "out", ExportConfig(weights="embed"))
    check_all(tmp_path / "out")
    monkeypatch.setattr(graph_check, "_READ_AT_ONCE", 0)  # as one of gigabytes: mapped
    check_all(tmp_path / "out")
    opened = load_bundle(tmp_path / "out")
    model = onnx.load(str(opened.model_path))
    next(item for item in model.graph.initializer if item.name == "lm_head.weight").dims[0] += 1
    opened.model_path.write_bytes(model.SerializeToString())
    with pytest.raises(LlamaExportError, match="not a graph that an export makes"):
        check_graph(opened, opened.model_path)


@pytest.mark.slow
def test_a_deep_model_is_checked_in_a_fraction_of_a_second(tmp_path: Path) -> None:
    """80 layers: 33 ms when this was written."""
    write_random_checkpoint(tmp_path / "deep", {**TINY, "num_hidden_layers": 80})
    export_checkpoint(tmp_path / "deep", None, ExportConfig(dtype="bfloat16"))
    opened = load_bundle(tmp_path / "deep")
    start = time.process_time()
    check_graph(opened, opened.model_path)
    assert time.process_time() - start < 0.3
