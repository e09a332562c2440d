"""A conversation to the text a chat model was trained on, by the checkpoint's own Jinja template.

The contract is Hugging Face's: https://huggingface.co/docs/transformers/chat_templating. A template is a program in a file
that somebody made. It runs in Jinja's immutable sandbox, in a process of its own (``template_worker.py``) that has limits
on its time, its memory and the length of its text: a limit inside this interpreter could not hold.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llama_export._system.files import read_small
from llama_export.config.huggingface import load_json_object
from llama_export.errors import ConfigError, ToolchainError

MAX_CHARACTERS = 2**23
"""Longest text a template may make: a conversation of 128k tokens is a tenth of it."""
MAX_SECONDS = 5.0
"""Longest rendering; an ordinary one takes a millisecond."""
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
        source = found._source(None)
        if "failed" in (reply := _RENDERER.ask(source, None)):
            raise found._error(reply)
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
        source = self._source(tools)
        given = {
            **self.tokens,
            **{key: _plain(value, key) for key, value in variables.items()},
            "messages": _checked_messages(messages),
            "tools": None if tools is None else _checked_objects(tools, "tools"),
            "documents": None if documents is None else _checked_objects(documents, "documents"),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        reply = _RENDERER.ask(source, given)
        if "text" not in reply:
            raise self._error(reply)
        return str(reply["text"])

    def _source(self, tools: object) -> str:
        name = self.name or ("tool_use" if tools is not None and "tool_use" in self.templates else "default")
        if name not in self.templates:
            raise ConfigError(
                f"there is no chat template named {name[:100]!r}",
                details={"file": self.file, "templates": ", ".join(sorted(self.templates))[:200]},
                hint="choose one of those",
            )
        return self.templates[name]

    def _error(self, reply: Mapping[str, Any]) -> ConfigError:
        """What stopped the compilation or the rendering, as a sentence."""
        details = {"file": self.file, **({"line": reply["line"]} if reply["line"] else {}), "reason": reply["reason"]}
        if reply["failed"] == "refused":
            del details["reason"]
            return ConfigError(
                f"the chat template refuses this conversation: {reply['reason']}",
                details=details,
                hint="change the order or the roles of the messages as it asks",
            )
        if reply["failed"] == "limit":
            details["limits"] = f"{MAX_CHARACTERS:,} characters, {MAX_SECONDS:g} s, 512 MiB of memory"
        message, hint = _FAILURES[reply["failed"]]
        return ConfigError(message, details=details, hint=hint)


_RESTORE = "restore the file from its source"
_FAILURES = {
    "syntax": ("the chat template has a syntax error", _RESTORE),
    "compile": ("the chat template cannot be compiled", _RESTORE),
    "limit": (
        "the chat template takes more time or memory than a template may",
        "do not trust this checkpoint, or shorten the conversation if that is what is long",
    ),
    "forbidden": (
        "the chat template tries what no template may do, and was stopped",
        "do not trust this checkpoint: a template has no business with Python's internals or its input",
    ),
    "other": (
        "the chat template cannot render this conversation",
        "does the template know these roles and this kind of content? Else restore it from its source",
    ),
}
"""What a worker's reply names -> the message and the hint."""


# ---- the process that renders -----------------------------------------------------------------------------------


class _Renderer:
    """One process, started when it is first needed. Threads use it one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, source: str, variables: Mapping[str, Any] | None) -> dict[str, Any]:
        """Renders a template, or compiles it where ``variables`` is None; see ``template_worker``.

        Raises:
            ToolchainError: no second interpreter can be started.
        """
        request = pickle.dumps((source, variables, MAX_CHARACTERS))
        with self._lock:
            process = self._process = self._process or self._start()
            timer = threading.Timer(MAX_SECONDS, process.kill)
            timer.start()
            try:
                return self._exchange(process, request)
            except (OSError, EOFError):  # it was killed, or it ran out of memory altogether
                self.stop()
                return {"failed": "limit", "line": None, "reason": "the process that renders it was ended"}
            except BaseException:  # an interrupt: the reply that is still to come belongs to nobody
                self.stop()
                raise
            finally:
                timer.cancel()

    def _start(self) -> subprocess.Popen[bytes]:
        specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
        folders = {str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin}
        worker = str(Path(__file__).with_name("template_worker.py"))
        reason: object = "it ended at once"
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", worker, *sorted(folders)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            if process.stdout is not None and len(process.stdout.read(8)) == 8:
                return process
            process.kill()
            process.communicate()
        except (OSError, TypeError) as err:
            reason = err
        raise ToolchainError(
            "chat templates are rendered by a second Python interpreter, which cannot be started",
            details={"interpreter": sys.executable, "reason": reason},
            hint="use `run`, or the Python API with token ids, which need no template",
        )

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes], request: bytes) -> dict[str, Any]:
        if process.stdin is None or process.stdout is None:
            raise EOFError
        process.stdin.write(len(request).to_bytes(8, "little") + request)
        process.stdin.flush()
        header = process.stdout.read(8)
        reply = process.stdout.read(int.from_bytes(header, "little"))
        if len(header) < 8 or len(reply) < int.from_bytes(header, "little"):
            raise EOFError
        return dict(json.loads(reply))

    def stop(self) -> None:
        """Ends the process; the next request starts another one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # what was not written yet
                        stream.close()
            process.wait()

    def forget(self) -> None:
        """After a fork: the process and the lock belong to the parent."""
        if self._process is not None:
            self._process.returncode = 0
        self._lock, self._process = threading.Lock(), None


_RENDERER = _Renderer()
atexit.register(_RENDERER.stop)
os.register_at_fork(after_in_child=_RENDERER.forget)


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
