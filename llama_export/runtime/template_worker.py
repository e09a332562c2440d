"""Renders chat templates in a process of its own, with limits on its memory. A script: it imports Jinja and nothing else.

``chat_template.py`` starts it with the folders of Jinja on the command line. A message is a length of 8 bytes, little
endian, and then the content. A request is a pickle, which only the parent writes: (source, variables, longest text);
variables of None ask for a check of the source. A reply is a JSON object with ``text``, or with ``failed`` (``syntax``,
``compile``, ``refused``, ``limit``, ``forbidden`` or ``other``), ``reason`` and ``line``. The first reply, at the start,
is empty. The process ends when its input does.

The environment is Hugging Face's: https://huggingface.co/docs/transformers/chat_templating (variables, filters, options),
in Jinja's sandbox: https://jinja.palletsprojects.com/en/stable/sandbox/.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path[:0] = sys.argv[1:]

import json
import pickle
import resource
import signal
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_MEMORY = 1 << 29
"""Address space of the process, bytes. Rendering a conversation of 128k tokens takes some 50 MB."""


class _Raised(TemplateError):
    """The template's own ``raise_exception(...)``."""


class _TooLong(Exception):
    """More characters than a text may have."""


class _GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}`` marks what the assistant wrote, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """Jinja's namespace without private names. Its text does not show what it holds, which may be itself."""

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
    """``dict`` for templates, without the other attributes of the class."""

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


class _Sandbox(ImmutableSandboxedEnvironment):
    """A Jinja environment configured like Hugging Face's. Access to a forbidden attribute raises an error; in Jinja's own
    sandbox it gives an undefined value, which prints as nothing."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControls])
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals |= {"namespace": _namespace, "dict": _Dict()}
        del self.globals["lipsum"]  # Hugging Face's environment has no random text

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"attribute {attribute[:100]!r} of a {type(obj).__name__} is out of bounds")


def _line(err: BaseException) -> int | None:
    """The innermost line of the template that an error went through."""
    line, trace = None, err.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _answer(
    compiled: dict[str, Template], source: str, variables: dict[str, Any] | None, longest: int
) -> dict[str, Any]:
    try:
        if source not in compiled:
            compiled[source] = _Sandbox().from_string(source)
    except TemplateSyntaxError as err:
        return {"failed": "syntax", "line": err.lineno, "reason": str(err.message)[:500]}
    except Exception as err:  # noqa: BLE001 - nested too deep for Jinja, or for the Python that it makes
        return {"failed": "compile", "line": None, "reason": f"{type(err).__name__}: {str(err)[:200]}"}
    if variables is None:
        return {}
    pieces, length = [], 0
    try:
        for piece in compiled[source].generate(variables):
            length += len(piece)
            if length > longest:
                raise _TooLong(f"more than {longest:,} characters")
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except _Raised as err:
        return {"failed": "refused", "line": _line(err), "reason": str(err)[:500]}
    except Exception as err:  # noqa: BLE001 - the parent says what it was
        limits = (_TooLong, OverflowError, MemoryError, RecursionError)
        kind = "limit" if isinstance(err, limits) else "forbidden" if isinstance(err, SecurityError) else "other"
        return {"failed": kind, "line": _line(err), "reason": f"{type(err).__name__}: {str(err)[:300]}"}


def main() -> None:
    """Answers requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    compiled: dict[str, Template] = {}
    reply = b""
    while True:
        replies.write(len(reply).to_bytes(8, "little") + reply)
        replies.flush()
        if len(header := requests.read(8)) < 8:
            return
        request = pickle.loads(requests.read(int.from_bytes(header, "little")))
        if len(compiled) > 16:
            compiled.clear()
        reply = json.dumps(_answer(compiled, *request)).encode()


if __name__ == "__main__":
    main()
