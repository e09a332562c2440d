"""A conversation with a bundle: what is said, kept and forgotten."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_export._system.files import json_from_bytes, read_small
from llama_export.bundle.bundle import load_bundle
from llama_export.config.huggingface import load_json_object
from llama_export.config.limits import MAX_JSON_BYTES
from llama_export.errors import ConfigError, ShapeError
from llama_export.runtime.chat_template import ChatTemplate
from llama_export.runtime.llm import LLM, Completion
from llama_export.runtime.opening import open_session
from llama_export.runtime.sampling_params import SamplingParams
from llama_export.runtime.text import TextCodec

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
        ignore_hashes: see :func:`llama_export.bundle.bundle.load_bundle`.
        **session: arguments of :func:`llama_export.runtime.opening.open_session`.

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
            with contextlib.suppress(SecondInterrupt):
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


# ---- in a terminal ----------------------------------------------------------------------------------------------


class SecondInterrupt(KeyboardInterrupt):
    """Ctrl-C again, before the token that the first one waits for."""
