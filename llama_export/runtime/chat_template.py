"""A conversation to the text a chat model was trained on, by the checkpoint's own Jinja template.

The contract is Hugging Face's: https://huggingface.co/docs/transformers/chat_templating (variables, filters, options) and
https://jinja.palletsprojects.com/en/stable/sandbox/. A template is a program in a file that somebody made: it runs in
Jinja's immutable sandbox, and what Python's memory and time would not survive (``'a' * 10**9``, doubled strings, loops in
loops) ends in an error. The limits hold per operation and per rendering; they are no proof against every waste.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from string import Formatter
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from llama_export._files import read_small
from llama_export.config import load_json_object
from llama_export.errors import ConfigError

MAX_CHARACTERS = 2**23
"""Longest text, and largest value, a template may make: a conversation of 128k tokens is a tenth of it."""
MAX_SECONDS = 10.0
"""Longest rendering; an ordinary one takes a millisecond."""
MAX_BITS = 4096
"""Of an integer."""
MAX_TEMPLATE_BYTES = 2**20
"""Largest ``chat_template.jinja``; the longest published ones have some 30 kB."""
_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_NO_TEMPLATE_HINT = "a base model continues text: llama-export run BUNDLE --prompt TEXT"
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""What Hugging Face's LlamaTokenizer takes where the checkpoint says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """The chat templates of one checkpoint; most have one."""

    file: Path
    """Where they were found; named in errors."""
    templates: Mapping[str, str]
    """Name -> Jinja source; ``default``, and for instance ``tool_use`` or ``rag``."""
    tokens: Mapping[str, str]
    """``bos_token``, ``eos_token``, ... -> their text: variables of the template."""
    name: str | None = None
    """The template to use; None: ``tool_use`` where there are tools and one of that name, else ``default``."""
    _compiled: dict[str, Template] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_folder(cls, folder: Path, name: str | None = None) -> ChatTemplate:
        """The templates of a bundle or checkpoint: ``chat_template.jinja``, else those in ``tokenizer_config.json``.

        Args:
            folder: holds the tokenizer's files.
            name: of the template to use, where there are several.

        Raises:
            ConfigError: no template, none of that name, one that is not Jinja, or files that cannot be read.
        """
        config = load_json_object(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
        file = folder / _CONFIG
        stated: object = config.get("chat_template")
        if (folder / _FILE).exists():
            file, stated = folder / _FILE, _text_of(folder / _FILE)
        elif stated is None and (folder / "chat_template.json").is_file():  # beside a processor's configuration
            file = folder / "chat_template.json"
            stated = load_json_object(file).get("chat_template")
        if stated is None:
            raise ConfigError(
                "this model has no chat template",
                details={"looked in": folder, "expected": f"{_FILE}, or `chat_template` in {_CONFIG}"},
                hint=_NO_TEMPLATE_HINT,
            )
        found = cls(file=file, templates=_named(stated, file), tokens=_tokens(config, folder), name=name)
        found._template(None)
        return found

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, special tokens included: encode it without adding others.

        Args:
            messages: ``{"role": ..., "content": ...}``, oldest first; content is a string, or a list of parts. Further
                keys (``name``, ``tool_calls``, ...) reach the template; a key whose value is None does not.
            add_generation_prompt: end where the assistant's answer begins.
            tools: JSON schemas of functions, for templates that know tools.
            documents: for templates that know retrieval.
            variables: more for the template (``date_string``, ``enable_thinking``); they win over the special tokens.

        Raises:
            ConfigError: messages of another form; the template refuses the conversation, fails, or does what no template
                may do.
        """
        template = self._template(tools)
        given = {
            **self.tokens,
            **{key: _plain(value, key) for key, value in variables.items()},
            "messages": _checked_messages(messages),
            "tools": None if tools is None else _checked_objects(tools, "tools"),
            "documents": None if documents is None else _checked_objects(documents, "documents"),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        reset = _DEADLINE.set(time.monotonic() + MAX_SECONDS)
        pieces, length = [], 0
        try:
            for piece in template.generate(given):
                length += len(piece)
                _check(length)
                pieces.append(piece)
        except Exception as err:
            raise self._error(err) from err
        finally:
            _DEADLINE.reset(reset)
        return "".join(pieces)

    def _template(self, tools: object) -> Template:
        name = self.name or ("tool_use" if tools is not None and "tool_use" in self.templates else "default")
        if name not in self.templates:
            raise ConfigError(
                f"there is no chat template named {name[:100]!r}",
                details={"file": self.file, "templates": ", ".join(sorted(self.templates))[:200]},
                hint="choose one of those",
            )
        if name not in self._compiled:
            try:
                self._compiled[name] = _Sandbox().from_string(self.templates[name])
            except TemplateSyntaxError as err:
                raise ConfigError(
                    "the chat template has a syntax error",
                    details={"file": self.file, "template": name, "line": err.lineno, "reason": err.message},
                    hint="restore the file from its source",
                ) from err
            except Exception as err:  # nested too deep for Jinja, or for the Python that it makes
                raise ConfigError(
                    "the chat template cannot be compiled",
                    details={"file": self.file, "template": name, "reason": f"{type(err).__name__}: {str(err)[:200]}"},
                    hint="restore the file from its source",
                ) from err
        return self._compiled[name]

    def _error(self, err: Exception) -> ConfigError:
        """What stopped the rendering, as a sentence."""
        details = {"file": self.file, **({"line": line} if (line := _line(err)) else {})}
        if isinstance(err, _Raised):
            return ConfigError(
                f"the chat template refuses this conversation: {str(err)[:500]}",
                details=details,
                hint="change the order or the roles of the messages as it asks",
            )
        details["reason"] = f"{type(err).__name__}: {str(err)[:300]}"
        if isinstance(err, _LimitError | OverflowError | MemoryError | RecursionError):
            return ConfigError(
                "the chat template takes more time or memory than a template may",
                details={**details, "limits": f"{MAX_CHARACTERS:,} characters, {MAX_SECONDS:g} s"},
                hint="do not trust this checkpoint, or shorten the conversation if that is what is long",
            )
        if isinstance(err, SecurityError):
            return ConfigError(
                "the chat template tries what no template may do, and was stopped",
                details=details,
                hint="do not trust this checkpoint: a template has no business with Python's internals or its input",
            )
        return ConfigError(
            "the chat template cannot render this conversation",
            details=details,
            hint="does the template know these roles and this kind of content? Else restore it from its source",
        )


def _line(err: BaseException) -> int | None:
    """The innermost line of the template that an error went through."""
    line, trace = None, err.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


# ---- what the checkpoint says -----------------------------------------------------------------------------------


def _text_of(path: Path) -> str:
    try:
        return read_small(path, MAX_TEMPLATE_BYTES).decode("utf-8")
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"`{path.name}` cannot be read",
            details={"file": path, "reason": getattr(err, "strerror", None) or err},
            hint="restore the file from its source",
        ) from err


def _named(stated: object, file: Path) -> dict[str, str]:
    """A string is the default template; a list (or an object) has several with their names."""
    if isinstance(stated, str):
        return {"default": stated}
    if isinstance(stated, list) and all(isinstance(item, dict) for item in stated):
        stated = {item.get("name"): item.get("template") for item in stated}
    if isinstance(stated, dict) and stated and all(isinstance(part, str) for item in stated.items() for part in item):
        return dict(stated)
    raise ConfigError(
        "bad value for chat_template",
        details={"file": file, "got": repr(stated)[:200], "expected": "a string, or a list of {name, template}"},
        hint="restore the file from its source",
    )


def _tokens(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The special tokens by name. Checkpoints before ``added_tokens_decoder`` keep them in a file of their own."""
    known = _LLAMA_TOKENS if str(config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer" else {}
    stated: dict[str, Any] = {**known, **config}
    older = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and older.is_file():
        stated |= load_json_object(older)
    tokens = {}
    for key, value in stated.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    return tokens


# ---- what the caller says ---------------------------------------------------------------------------------------


def _checked_messages(messages: object) -> list[dict[str, Any]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        _refuse("messages are not a list of at least one message", messages, '[{"role": "user", "content": "..."}]')
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            _refuse(f"{where} is not an object", message, '{"role": "user", "content": "..."}')
        # Clients of chat APIs send `content: null` beside tool calls; templates know a key that is absent.
        plain = {key: value for key, value in _plain(message, where).items() if value is not None}
        if not isinstance(plain.get("role"), str):
            _refuse(f"{where} has no role", plain.get("role"), "a string: system, user, assistant, ...")
        content = plain.get("content")
        if content is None and len(plain) == 1:
            _refuse(f"{where} has no content", content, "a string, or a list of parts")
        parts = content if isinstance(content, list) else []
        if not isinstance(content, str | list | None) or not all(isinstance(part, str | dict) for part in parts):
            _refuse(
                f"the content of {where} is neither text nor a list of parts", content, "a string, or a list of objects"
            )
        reasoning = next((plain[key] for key in _REASONING if key in plain), None)
        if reasoning is not None:  # templates read one name or another
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        checked.append(plain)
    return checked


_REASONING = ("reasoning_content", "thinking", "reasoning")


def _checked_objects(items: object, where: str) -> list[dict[str, Any]]:
    plain = _plain(items, where)
    if not isinstance(plain, list) or not all(isinstance(item, dict) for item in plain):
        _refuse(f"{where} is not a list of objects", plain, "[{...}, ...]")
    return plain


def _plain(value: object, where: str) -> Any:
    """A copy out of JSON's types alone: no method of another object comes within reach of a template."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = str.__str__(value)
        if not text.isascii() and _SURROGATE.search(text):
            _refuse(f"{where} is not Unicode text", text, "no lone surrogates")
        return text
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    _refuse(f"{where} is not plain data", type(value).__name__, "what JSON can hold")


_SURROGATE = re.compile("[\ud800-\udfff]")


def _refuse(message: str, got: object, expected: str) -> NoReturn:
    raise ConfigError(
        message,
        details={"got": repr(got)[:200], "expected": expected},
        hint="messages are objects with a role and a content",
    )


# ---- the sandbox ------------------------------------------------------------------------------------------------


class _Raised(TemplateError):
    """The template's own ``raise_exception(...)``."""


class _LimitError(Exception):
    """More characters or seconds than a template may take."""


_DEADLINE: ContextVar[float] = ContextVar("_DEADLINE", default=float("inf"))


def _tick() -> None:
    if time.monotonic() > _DEADLINE.get():
        raise _LimitError("out of time")


def _check(size: int) -> None:
    _tick()
    if size > MAX_CHARACTERS:
        raise _LimitError("too many characters")


def _size(value: object) -> int:
    """Characters of a value written out: a part that is shared counts as often as it would appear. Stops at the limit."""
    total, rest = 0, [value]
    while rest and total <= MAX_CHARACTERS:
        item = rest.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, Mapping):
            total += 2 * len(item)
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            total += 2 * len(item)
            rest += item
        elif isinstance(item, int):
            total += 1 + item.bit_length() // 3
        elif isinstance(item, range):
            total += 6 * len(item)
        else:
            total += 8
    return total


class _Metered:
    """An iterable that keeps an eye on the clock and on the size of what it has given."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        total = 0
        for item in self._items:
            total += _size(item)
            _check(total)
            yield item

    def __len__(self) -> int:
        return len(self._items)


def _metered(value: Any) -> Any:
    """A lazy iterator has no size before it is consumed."""
    return iter(_Metered(value)) if isinstance(value, Iterator) else value


_GROWING = {
    *("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes", "translate"),
    *("indent", "wordwrap", "tojson", "batch", "slice", "round"),
}
"""Methods and filters whose result may be longer than all that goes in."""


def _check_growth(name: str, values: Sequence[Any]) -> None:
    """Refuses a method or filter whose result would be too large, before there is one.

    Args:
        name: of a method of Python's or a filter of Jinja's; those of one name do the same.
        values: what it is called on, then its arguments.
    """
    sizes = [_size(value) for value in values]
    _check(sum(sizes))
    if name in _GROWING:
        numbers = sum(abs(value) for value in values[1:] if isinstance(value, int))
        _check(max(1, sizes[0]) * (1 + numbers + sum(sizes[1:])))
    elif name == "replace" and len(values) >= 3:
        _check(sizes[0] + str(values[0]).count(str(values[1])) * sizes[2])
    elif name == "join":
        many = [len(value) for value in values if isinstance(value, list | tuple | str)]
        _check(sum(sizes) + functools.reduce(lambda a, b: a * b, many, 1))


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's within the limits. Its marks, of what Jinja passes first, come along."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if name == "format":
            _check_percent(args[0], args[1:] or kwargs)
        _check_growth(name, [*args[first:], *kwargs.values()])
        result = function(*(_metered(value) for value in args), **kwargs)
        _check(_size(result))
        return result

    return guarded


_WIDE = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(?:\*|\d{5,}|\d*\.(?:\*|\d{5,}))")


def _check_percent(form: object, values: object) -> None:
    if isinstance(form, str):
        if _WIDE.search(form):
            raise _LimitError("a field is too wide")
        _check(len(form) + form.count("%") * _size(values))


def _joined(parts: list[Any]) -> str:
    """Jinja's ``~``."""
    _check(_size(parts))
    return "".join(map(str, parts))


class _Limits(NodeTransformer):
    """Puts the limits where Jinja has no hook: on every loop, and on ``~``."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - Jinja finds it by this name
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_metered")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno, environment=node.environment)
        return _filtered(parts, "_joined")


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


class _Generator(CodeGenerator):
    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:  # noqa: N802
        super().visit_Template(_Limits().visit(node), frame)


class _GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}`` marks what the assistant wrote, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """Jinja's, which cannot print what it holds: that may be itself, or much."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name[:100]!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    found = _Namespace()
    for name, value in dict(*args, **kwargs).items():
        found[name] = value
    return found


class _Dict:
    """``dict`` for templates, without what else hangs on the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | str | None = None, separators: Any = None, sort_keys: bool = False
) -> str:  # fmt: skip
    """JSON as it is; Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise _Raised(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _finalized(value: Any) -> Any:
    """Every ``{{ value }}`` before it becomes text."""
    if not isinstance(value, Undefined):
        _check(_size(value))
    return value


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as Hugging Face sets it up, with limits, and deaf to no forbidden attribute.

    Jinja answers ``''.__class__`` with an undefined value, which prints as nothing; here it is an error at once.
    """

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_joined)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControls], finalize=_finalized
        )
        self.filters = {
            name: _guarded(name, function) for name, function in {**self.filters, "tojson": _tojson}.items()
        }
        self.filters.update(_metered=_Metered, _joined=_joined)
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals |= {"namespace": _namespace, "dict": _Dict()}
        del self.globals["lipsum"]  # makes text out of nothing

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"attribute {attribute[:100]!r} of a {type(obj).__name__} is out of bounds")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if operator == "%":
            _check_percent(left, right)
        elif len(numbers) == 2 and operator in ("*", "**"):
            bits = [max(1, value.bit_length()) for value in numbers]
            if (sum(bits) if operator == "*" else bits[0] * abs(numbers[1])) > MAX_BITS:
                raise _LimitError("too large a number")
        elif operator == "*" and numbers:
            _check((_size(left) + _size(right)) * max(1, *numbers, 1))
        elif operator == "+" and not numbers:
            _check(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            fields = [spec for _, name, spec, _ in Formatter().parse(value.__self__) if name is not None]
            if any("{" in (spec or "") or re.search(r"\d{5,}", spec or "") for spec in fields):
                raise _LimitError("a field is too wide")
            _check(len(value.__self__) + len(fields) * (_size(args) + _size(kwargs)))
            return wrapped(*args, **kwargs)

        return checked

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - `self` may be a keyword
        _tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int):
            _check_growth(__obj.__name__, [owner, *args, *kwargs.values()])
            args = tuple(_metered(value) for value in args)
        return super().call(__context, __obj, *args, **kwargs)
