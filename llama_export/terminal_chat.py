"""A conversation with a bundle: what is said, kept, forgotten; and the terminal a person has it in.

:class:`Conversation` knows nothing of terminals, :class:`TerminalChat` nothing of models. What a model writes may hold
escape sequences; none reaches a terminal (https://cwe.mitre.org/data/definitions/150.html).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from llama_export._files import json_from_bytes, read_small
from llama_export.bundle import json_bytes, load_bundle, write_atomically
from llama_export.config import MAX_JSON_BYTES, count_parameters, load_json_object
from llama_export.errors import ConfigError, LlamaExportError, ShapeError
from llama_export.llm import LLM, Completion, open_session
from llama_export.runtime.chat_template import ChatTemplate
from llama_export.runtime.text import TextCodec
from llama_export.sampling_params import SamplingParams

DEFAULT_TEMPERATURE = 0.7
"""Where neither the user nor the checkpoint says."""
DEFAULT_MAX_NEW_TOKENS = 1024
SETTINGS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
)
"""Fields of :class:`SamplingParams` that a conversation may set."""
_INTEGERS = ("max_new_tokens", "top_k", "seed")


def open_chat_model(folder: Path, *, ignore_hashes: bool = False, **session: Any) -> LLM:
    """A bundle's model, once it is known that it can chat.

    Args:
        folder: the bundle.
        ignore_hashes: see :func:`llama_export.bundle.load_bundle`.
        **session: arguments of :func:`llama_export.llm.open_session`.

    Raises:
        ConfigError: no chat template or tokenizer; and what opening a bundle and a session raises.
    """
    opened = load_bundle(folder, ignore_hashes=ignore_hashes)
    if opened.task == "causal-lm":
        ChatTemplate.from_folder(opened.folder)  # weights take long to open, and would be in vain
    return LLM(opened, open_session(opened, **session), TextCodec(opened.folder))


def default_sampling(folder: Path) -> dict[str, Any]:
    """What the checkpoint's ``generation_config.json`` says of sampling, else temperature 0.7.

    As in Hugging Face's ``generate``: ``do_sample: false`` is greedy, ``do_sample: true`` without a temperature is 1.

    Raises:
        ConfigError: the file cannot be read, or a value is out of range.
    """
    path = folder / "generation_config.json"
    stated = load_json_object(path) if path.is_file() else {}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    found = {name: stated[name] for name in names if stated.get(name) is not None}
    if stated.get("do_sample") is False:
        found["temperature"] = 0.0
    found.setdefault("temperature", 1.0 if stated.get("do_sample") else DEFAULT_TEMPERATURE)
    SamplingParams(**found)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer."""

    text: str
    completion: Completion
    first_seconds: float
    """From the question to the first token, as a person waits for it."""
    was_stopped: bool
    """By the user, before its end."""
    was_full: bool
    """It ended because the cache holds no more."""


class Conversation:
    """Messages, and a model that continues them.

    Args:
        llm: with a chat template and a tokenizer.
        system: the system message, if any.
        sampling: fields of :class:`SamplingParams`, of :data:`SETTINGS`.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(self, llm: LLM, *, system: str | None = None, sampling: Mapping[str, Any] | None = None) -> None:
        self.llm = llm
        self.messages: list[dict[str, str]] = []
        self.sampling: dict[str, Any] = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, **(sampling or {})}
        SamplingParams(**self.sampling)
        self.forgotten = 0
        """Messages that were dropped because the cache holds no more."""
        self._retries = 0
        self.set_system(system)

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds."""
        return self.llm.session.capacity

    @property
    def system(self) -> str | None:
        """The system message."""
        return self.messages[0]["content"] if self._turns_begin() else None

    def set_system(self, text: str | None) -> None:
        """Sets, replaces or (None) removes the system message; what was said stays."""
        self.messages[: self._turns_begin()] = [] if text is None else [{"role": "system", "content": text}]

    def set(self, name: str, value: Any) -> None:
        """Changes a setting; text is read as the number it spells, ``none`` as None.

        Raises:
            ConfigError: unknown, or out of range.
        """
        if name not in SETTINGS:
            raise ConfigError(
                f"there is no setting {name[:100]!r}",
                details={"expected": ", ".join(SETTINGS)},
                hint="for instance: /set temperature 0.7",
            )
        if isinstance(value, str):
            with contextlib.suppress(ValueError):  # what is no number is refused below, in words
                value = None if value.lower() == "none" else (int if name in _INTEGERS else float)(value)
        changed = {**self.sampling, name: value}
        try:
            SamplingParams(**changed)
        except ConfigError as err:  # whose hint is of the command line
            raise ConfigError(err.message, details=err.details, hint="for instance: /set temperature 0.7") from err
        self.sampling = changed

    def reset(self) -> None:
        """Forgets everything but the system message."""
        del self.messages[self._turns_begin() :]

    def replace(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Continues another conversation.

        Raises:
            ConfigError: the chat template refuses it.
        """
        if messages:
            self.llm.chat_template.render(messages)
        self.messages = [dict(message) for message in messages]

    def count_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Length of the prompt that these messages become."""
        codec = self.llm.codec or TextCodec(self.llm.bundle.folder)
        return len(codec.encode(self.llm.chat_template.render(messages), add_special_tokens=False))

    def ask(
        self,
        text: str,
        *,
        on_piece: Callable[[str], None] = lambda piece: None,
        on_forgotten: Callable[[int], None] = lambda count: None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Says ``text``, and lets the model answer. After an error nothing was said.

        Args:
            text: the user's message.
            on_piece: takes each piece of the answer as it is made.
            on_forgotten: told, before the answer, how many of the oldest messages were dropped for want of room.
            is_stopped: asked after every token. What was answered until then stays.

        Raises:
            ConfigError: the chat template refuses the conversation.
            ShapeError: the system message and this one alone are more than the cache holds.
            ToolchainError: the backend failed.
        """
        self._retries = 0
        return self._answer([*self.messages, {"role": "user", "content": text}], on_piece, on_forgotten, is_stopped)

    def retry(
        self,
        *,
        on_piece: Callable[[str], None] = lambda piece: None,
        on_forgotten: Callable[[int], None] = lambda count: None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Answers the last message anew; with a seed, the n-th retry draws with seed + n. Otherwise like :meth:`ask`.

        Raises:
            ConfigError: nothing was asked yet.
        """
        last = next((at for at, message in reversed([*enumerate(self.messages)]) if message["role"] == "user"), None)
        if last is None:
            raise ConfigError("there is nothing to answer anew", hint="say something first")
        self._retries += 1
        return self._answer(self.messages[: last + 1], on_piece, on_forgotten, is_stopped)

    def _answer(
        self, messages: list[dict[str, str]], on_piece: Callable[[str], None], on_forgotten: Callable[[int], None],
        is_stopped: Callable[[], bool],
    ) -> Reply:  # fmt: skip
        kept, used = self._fitting(messages)
        if len(kept) < len(messages):
            on_forgotten(len(messages) - len(kept))
        room = self.capacity - used + 1  # the last token of an answer needs no place in the cache
        wanted = int(self.sampling["max_new_tokens"])
        params = SamplingParams(**{**self.sampling, "max_new_tokens": min(wanted, room), "seed": self._seed()})
        start, first, pieces = time.perf_counter(), None, []
        with self.llm.chat(kept, params) as generation:
            # A second Ctrl-C comes as an exception, in the midst of a step; the first one waits for its end.
            with contextlib.suppress(_SecondInterrupt):
                for piece in generation:
                    first = first or time.perf_counter() - start
                    pieces.append(piece)
                    on_piece(piece)
                    if is_stopped():
                        break
            generation.close()
            completion = generation.result
        text, was_stopped = "".join(pieces), completion.finish_reason is None
        self.forgotten += len(messages) - len(kept)
        # A question without any answer would leave two in a row, which many templates refuse.
        said = text or not was_stopped
        self.messages = [*kept, {"role": "assistant", "content": text}] if said else kept[:-1]
        return Reply(
            text=text, completion=completion, first_seconds=first or 0.0, was_stopped=was_stopped,
            was_full=completion.finish_reason == "length" and room <= wanted,
        )  # fmt: skip

    def _fitting(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], int]:
        """The messages without as many of the oldest turns as it takes to leave room for an answer, and their tokens."""
        reserved = min(int(self.sampling["max_new_tokens"]), max(1, self.capacity // 4))
        kept, used = messages, self.count_tokens(messages)
        while used + reserved - 1 > self.capacity:
            begin = self._turns_begin(kept)
            later = next((at for at in range(begin + 1, len(kept)) if kept[at]["role"] == "user"), None)
            if later is None:
                break
            kept = [*kept[:begin], *kept[later:]]
            used = self.count_tokens(kept)
        if used > self.capacity:
            raise ShapeError(
                f"this message is {used} tokens with what must stand before it, and the cache holds {self.capacity}",
                details={"got": f"{used} tokens", "expected": f"at most {self.capacity}"},
                hint="shorten it, or start again with a larger --max-seq-len",
            )
        return kept, used

    def _seed(self) -> int | None:
        seed: int | None = self.sampling.get("seed")
        return None if seed is None else (seed + self._retries) % 2**64

    def _turns_begin(self, messages: Sequence[Mapping[str, str]] | None = None) -> int:
        """1 where a system message stands first, else 0."""
        found = self.messages if messages is None else messages
        return int(bool(found) and found[0]["role"] == "system")

    def to_json(self) -> dict[str, Any]:
        """What ``/save`` writes."""
        return {
            "model": self.llm.bundle.folder.resolve().name, "backend": self.llm.session.backend,
            "sampling": self.sampling, "messages": self.messages,
        }  # fmt: skip


def messages_from_file(path: Path) -> list[dict[str, str]]:
    """What ``/save`` wrote, or a bare list of messages.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        data = json_from_bytes(read_small(path, MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(
            f"`{path.name}` cannot be read as JSON",
            details={"file": path, "reason": getattr(err, "strerror", None) or err},
            hint="check the path; /save FILE writes such a file",
        ) from err
    messages = data.get("messages") if isinstance(data, dict) else data
    parts = ("role", "content")
    if not isinstance(messages, list) or not all(
        isinstance(item, dict) and all(isinstance(item.get(part), str) for part in parts) for item in messages
    ):
        raise ConfigError(
            f"`{path.name}` holds no conversation",
            details={"file": path, "expected": '{"messages": [{"role": "user", "content": "..."}, ...]}'},
            hint="/save FILE writes such a file",
        )
    return [{part: message[part] for part in parts} for message in messages]


# ---- without a terminal -----------------------------------------------------------------------------------------


def answer_lines(
    conversation: Conversation, lines: Iterator[str], *, write: Callable[[str], None], log: Callable[[str], None]
) -> list[Reply]:
    """One message per line, empty ones left out; answers go out as they are made, each ends its line.

    Args:
        conversation: is continued.
        lines: what the user says.
        write: takes pieces of the answers.
        log: takes a line about each answer.

    Raises:
        LlamaExportError: see :meth:`Conversation.ask`.
    """
    replies = []
    for line in lines:
        if not line.strip():
            continue
        reply = conversation.ask(
            line.rstrip("\r\n"),
            on_piece=write,
            on_forgotten=lambda count: log(f"chat: {_forgotten(count, conversation)}"),
        )
        write("" if reply.text.endswith("\n") else "\n")
        log(f"chat: {_facts(reply, conversation)}")
        replies.append(reply)
    return replies


def document(conversation: Conversation, replies: Sequence[Reply]) -> dict[str, Any]:
    """The conversation as ``chat --json`` prints it."""
    answers = []
    for reply in replies:
        done, speed = reply.completion, reply.completion.decode_tokens_per_second
        answers.append({
            "text": reply.text, "finish_reason": done.finish_reason, "tokens": len(done.tokens),
            "prompt_tokens": done.prompt_tokens, "reused_tokens": done.reused_tokens,
            "first_token_seconds": round(reply.first_seconds, 6), "prefill_seconds": round(done.prefill_seconds, 6),
            "decode_tokens_per_second": None if speed is None else round(speed, 2),
        })  # fmt: skip
    capacity, forgotten = conversation.capacity, conversation.forgotten
    return {
        **conversation.to_json(),
        "kv_cache_capacity": capacity,
        "forgotten_messages": forgotten,
        "answers": answers,
    }


def _facts(reply: Reply, conversation: Conversation) -> str:
    """The line below an answer."""
    done, speed = reply.completion, reply.completion.decode_tokens_per_second
    used = done.prompt_tokens + len(done.tokens)
    parts = [
        f"{len(done.tokens)} token{'s' * (len(done.tokens) != 1)}",
        *([] if speed is None else [f"{speed:.1f} tokens/s"]),
        f"first after {reply.first_seconds:.2f} s",
        f"context {min(100 * used // conversation.capacity, 100)}% full",
        *([f"{done.reused_tokens} reused"] if done.reused_tokens else []),
    ]
    return ", ".join(parts)


def _forgotten(count: int, conversation: Conversation) -> str:
    plural = "s" if count != 1 else ""
    return f"the conversation no longer fits {conversation.capacity} tokens: forgot the oldest {count} message{plural}"


# ---- in a terminal ----------------------------------------------------------------------------------------------

_VISIBLE: dict[int, int | None] = {
    **{code: 0x2400 + code for code in range(32)}, 0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    ord("\n"): ord("\n"), ord("\t"): ord("\t"), ord("\r"): None,
}  # fmt: skip


def visible(text: str) -> str:
    """Text that steers no terminal: control characters become pictures of themselves, of which none is left but line
    breaks and tabs."""
    return text.translate(_VISIBLE)


class _SecondInterrupt(KeyboardInterrupt):
    """Ctrl-C again, before the token that the first one waits for."""


class _Interrupt:
    """While it is entered, Ctrl-C is noted and not raised: a step of the model ends before the answer does."""

    def __init__(self) -> None:
        self.came = False
        self._before: Any = None

    def __enter__(self) -> _Interrupt:
        with contextlib.suppress(ValueError):  # not in the main thread: there is no Ctrl-C
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.came:
            raise _SecondInterrupt
        self.came = True


_DIM, _BOLD, _RED, _PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[31m", "\x1b[0m"
_COMMANDS = {
    "/help": ("", "this list"),
    "/reset": ("", "forget the conversation, keep the system message"),
    "/system": ("TEXT", "set the system message; alone: show it; `-`: remove it"),
    "/set": ("NAME VALUE", "change how answers are drawn; alone: show all"),
    "/retry": ("", "answer the last message anew"),
    "/save": ("FILE", "write the conversation as JSON"),
    "/load": ("FILE", "continue a saved conversation"),
    "/exit": ("", "leave, like Ctrl-D"),
}


class TerminalChat:
    """Reads messages and commands, shows answers.

    Args:
        conversation: is continued.
        out: the terminal.
        color: whether to use colours.
        read: shows a prompt, returns a line; raises EOFError, KeyboardInterrupt. ``input`` by default.
    """

    def __init__(
        self, conversation: Conversation, *, out: TextIO, color: bool, read: Callable[[str], str] | None = None
    ) -> None:
        self._conversation = conversation
        self._out = out
        self._color = color
        self._readline = _line_editor() if read is None else None
        self._read = read or input

    def run(self) -> None:
        """Until Ctrl-D, Ctrl-C at an empty prompt, or ``/exit``."""
        self._greet()
        while True:
            try:
                text = self._message()
            except EOFError:
                self._write("\n")
                return
            except KeyboardInterrupt:
                self._write("\n")
                if self._readline is None or not self._readline.get_line_buffer():
                    return
                continue
            if text.strip() == "/exit":
                return
            try:
                self._obey(text)
            except LlamaExportError as err:
                self._write(f"{self._styled('error:', _BOLD + _RED)} {err}\n\n")
            except KeyboardInterrupt:
                self._write("\n")

    def _greet(self) -> None:
        llm, conversation = self._conversation.llm, self._conversation
        parts = (
            f"{_magnitude(count_parameters(llm.bundle.config))} parameters, {llm.bundle.dtype}",
            llm.session.backend,
            f"{conversation.capacity} tokens of context",
        )
        name = visible(llm.bundle.folder.resolve().name)
        self._write(f"{self._styled(name, _BOLD)}: {', '.join(parts)}\n")
        if llm.session.note:
            self._note(llm.session.note)
        self._note("/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.")
        if conversation.system is not None:
            self._note(f"system: {conversation.system}")
        self._write("\n")

    def _message(self) -> str:
        r"""A line; or several: pasted, joined by backslashes at their ends, or between lines of three quotes."""
        more = self._prompt("... ", _DIM)
        text = self._read(self._prompt("> ", _BOLD))
        if text.lstrip().startswith('"""'):
            text = text.lstrip()[3:]
            while not text.rstrip().endswith('"""'):
                text += "\n" + self._read(more)
            return text.rstrip()[:-3].strip("\n")
        while (len(text) - len(text.rstrip("\\"))) % 2:
            text = text[:-1] + "\n" + self._read(more)
        return text

    def _obey(self, text: str) -> None:
        """One message, or one command."""
        if not text.strip():
            return
        if not text.startswith("/") or text.startswith("//"):
            self._show(self._conversation.ask, text[1:] if text.startswith("//") else text)
            return
        name, _, rest = text.strip().partition(" ")
        command = getattr(self, f"_do_{name[1:]}", None) if name in _COMMANDS else None
        if command is None:
            self._note(
                f"there is no command {name[:100]}; /help lists them, and //{name[1:100]} says it to the model\n"
            )
        elif _COMMANDS[name][0] == "FILE" and not rest.strip():
            self._note(f"{name} needs a file: {name} chat.json\n")
        else:
            command(rest.strip())

    def _show(self, answer: Callable[..., Reply], *arguments: str) -> None:
        """An answer as it comes, and the facts below it."""
        is_blank, is_waiting = True, True
        self._write(self._styled("...", _DIM))

        def settle() -> None:
            nonlocal is_waiting
            if is_waiting:
                self._write("\r   \r")
                is_waiting = False

        def show(piece: str) -> None:
            nonlocal is_blank
            shown = visible(piece)
            if is_blank:  # some templates leave a line break to the model
                shown = shown.lstrip()
            if shown:
                settle()
                is_blank = False
                self._write(shown)

        def tell(count: int) -> None:
            settle()
            self._note(_forgotten(count, self._conversation))

        with _Interrupt() as interrupt:
            try:
                reply = answer(*arguments, on_piece=show, on_forgotten=tell, is_stopped=lambda: interrupt.came)
            finally:
                settle()
        if not is_blank and not reply.text.endswith("\n"):
            self._write("\n")
        facts = _facts(reply, self._conversation)
        if reply.was_stopped:
            facts += ", stopped" if reply.text else ", stopped before it began: nothing was said"
        elif reply.was_full:
            facts += ", cut off: the context is full"
        elif reply.completion.finish_reason == "length":
            facts += ", cut off at max_new_tokens"
        self._note(f"{facts}\n")

    def _do_help(self, _: str) -> None:
        for name, (argument, help_text) in _COMMANDS.items():
            usage = f"{name} {argument}".strip()
            self._write(f"  {self._styled(f'{usage:<16}', _BOLD)} {help_text}\n")
        self._note('A \\ at the end of a line continues it; """ begins and ends several lines.\n')

    def _do_reset(self, _: str) -> None:
        self._conversation.reset()
        self._note("forgotten\n")

    def _do_system(self, text: str) -> None:
        if text:
            self._conversation.set_system(None if text == "-" else text)
        system = self._conversation.system
        self._note("no system message\n" if system is None else f"system: {system}\n")

    def _do_set(self, text: str) -> None:
        name, _, value = text.replace("=", " ").partition(" ")
        if value.strip():
            self._conversation.set(name.replace("-", "_"), value.strip())
        elif name:
            self._conversation.set(name.replace("-", "_"), "")  # says what is expected
        params = SamplingParams(**self._conversation.sampling)
        values = dataclasses.asdict(params)
        self._note("\n".join(f"  {setting:<18} {values[setting]}" for setting in SETTINGS) + "\n")

    def _do_retry(self, _: str) -> None:
        self._show(self._conversation.retry)

    def _do_save(self, file: str) -> None:
        path = _path(file)
        write_atomically(path, json_bytes(self._conversation.to_json()))
        self._note(f"saved {len(self._conversation.messages)} messages to {path}\n")

    def _do_load(self, file: str) -> None:
        messages = messages_from_file(_path(file))
        self._conversation.replace(messages)
        self._note(f"{len(messages)} messages\n")

    def _note(self, text: str) -> None:
        """A line about the conversation, which is not part of it."""
        text, end = (text[:-1], "\n\n") if text.endswith("\n") else (text, "\n")
        self._write(self._styled(visible(text), _DIM) + end)

    def _styled(self, text: str, style: str) -> str:
        return f"{style}{text}{_PLAIN}" if self._color else text

    def _prompt(self, text: str, style: str) -> str:
        if not self._color:
            return text
        # The marks tell readline what takes no room on the line.
        begin, end = ("\x01", "\x02") if self._readline is not None else ("", "")
        return f"{begin}{style}{end}{text}{begin}{_PLAIN}{end}"

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def _line_editor() -> Any:
    """readline, where there is one, with completion of commands; ``input`` uses it, and remembers what was said."""
    try:
        import readline
    except ImportError:  # Windows
        return None

    def complete(text: str, state: int) -> str | None:
        line = readline.get_line_buffer()
        words = SETTINGS if line.startswith("/set ") else tuple(_COMMANDS) if line.startswith("/") else ()
        found = [f"{word} " for word in words if word.startswith(text)]
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    if "libedit" in (readline.__doc__ or ""):
        readline.parse_and_bind("bind ^I rl_complete")
    else:
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")  # several lines are one message
    return readline


def wants_color(out: TextIO) -> bool:
    """A terminal, and nobody who asked for none: https://no-color.org."""
    return out.isatty() and not os.environ.get("NO_COLOR")


def _path(file: str) -> Path:
    with contextlib.suppress(RuntimeError):  # no such user
        path = Path(file).expanduser()
        if path.name and "\0" not in file:
            return path
    raise ConfigError(f"{file[:200]!r} is not the name of a file", hint="for instance: chat.json")


def _magnitude(count: int) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:,}"
