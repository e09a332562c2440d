"""The terminal in which a person has a conversation with a bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from llama_export._system.text import terminal_text
from llama_export.bundle.destination import json_bytes, write_atomically
from llama_export.config.decoder import count_parameters
from llama_export.errors import ConfigError, LlamaExportError
from llama_export.runtime.conversation import SETTINGS, Conversation, Reply, SecondInterrupt, messages_from_file
from llama_export.runtime.sampling_params import SamplingParams

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
            raise SecondInterrupt
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
        name = terminal_text(llm.bundle.folder.resolve().name)
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
            shown = terminal_text(piece)
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
        self._write(self._styled(terminal_text(text), _DIM) + end)

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
