"""Text to token ids and back, with the checkpoint's own ``tokenizer.json``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_export._system.files import read_small
from llama_export.config.limits import MAX_TOKENIZER_BYTES
from llama_export.errors import ConfigError

_HINT = "copy the checkpoint's own again, or give token ids instead: --tokens 1,2,3"


class TextCodec:
    """The tokenizer of a bundle. Settings for padding and truncation in its file are ignored: a prompt is what it is.

    Args:
        folder: bundle or checkpoint that holds ``tokenizer.json``.

    Raises:
        ConfigError: it is missing, larger than ``config.MAX_TOKENIZER_BYTES`` or cannot be read. All methods raise it,
            too, where the tokenizer library fails on this file.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                "`tokenizer.json` is missing",
                details={"looked in": folder},
                hint="copy the checkpoint's (where it has a `tokenizer.model` only: transformers' AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(...) writes it), or give token ids instead: --tokens 1,2,3",
            )
        try:
            raw = read_small(path, MAX_TOKENIZER_BYTES)
        except OSError as err:
            raise ConfigError(
                "`tokenizer.json` cannot be read", details={"file": path, "reason": err.strerror or err}, hint=_HINT
            ) from err
        self._tokenizer = _call(Tokenizer.from_buffer, raw, file=path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, with the special tokens the tokenizer adds itself (a leading <s> in Llama) unless the
        text has them already, as a chat template's does.

        Raises:
            ConfigError: the text holds half of a surrogate pair.
        """
        _check_unicode(text)
        ids: list[int] = _call(self._tokenizer.encode, text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_with_offsets(self, text: str, pair: str | None = None) -> Encoding:
        """Token ids, and where in the text each token lies; ``pair`` is a second text (a question's context).

        Raises:
            ConfigError: a text holds half of a surrogate pair.
        """
        for part in (text, pair or ""):
            _check_unicode(part)
        found = _call(self._tokenizer.encode, text, pair)
        return Encoding(list(found.ids), list(found.offsets), list(found.sequence_ids), list(found.tokens))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = _call(self._tokenizer.decode, list(tokens), skip_special_tokens=True)
        return text

    def text_of(self, token: int) -> str:
        """What one token adds to a text, its leading space included; a special token's name."""
        once, twice = (_call(self._tokenizer.decode, [token] * count, skip_special_tokens=False) for count in (1, 2))
        added: str = twice[len(once) :]  # the first token of a text may lose its space
        return added

    def piece_of(self, token: int) -> tuple[str, bytes | None]:
        """A token's own text, and its bytes where the text alone does not say them.

        A token may hold a part of a character. Its text then has U+FFFD for each such part, and its bytes are those of the
        vocabulary (byte-level BPE, or ``<0x0A>``); None if the vocabulary does not say them. For any other token bytes are
        None: they are the text in UTF-8.
        """
        text = self.text_of(token)
        return text, self._bytes_of(token) if "\ufffd" in text else None

    def _bytes_of(self, token: int) -> bytes | None:
        spelled: str = self._tokenizer.id_to_token(token) or ""
        if match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", spelled):
            return bytes.fromhex(match[1])
        codes = [_BYTE_OF_CHARACTER.get(character) for character in spelled]
        return None if not codes or None in codes else bytes(code for code in codes if code is not None)

    def stream(self, stop: Sequence[str] = ()) -> StopStream:
        """A decoder for tokens that arrive one by one, whose text ends before the first of ``stop``."""
        return StopStream(TextStream(self._tokenizer), stop)


def _call(function: Callable[..., Any], *arguments: Any, file: Path | None = None, **settings: Any) -> Any:
    """Calls the tokenizer library. A panic of its Rust code is not an ``Exception``, and comes from a damaged file too.

    Raises:
        ConfigError: the library fails, whatever it raises.
    """
    try:
        return function(*arguments, **settings)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as err:
        raise ConfigError(
            "the tokenizer fails on this text" if file is None else "`tokenizer.json` cannot be read",
            details={**({} if file is None else {"file": file}), "reason": f"{type(err).__name__}: {err}"},
            hint=_HINT,
        ) from err


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte in the vocabularies of byte-level BPE: printable Latin-1 is itself, the rest follows from U+0100 on.

    Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py (bytes_to_unicode)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise ConfigError(
            f"the text is not Unicode: character {err.start} is half of a surrogate pair",
            details={
                "got": ascii(text[max(0, err.start - 20) : err.start + 20]),
                "expected": "text that UTF-8 can hold",
            },
            hint="decode the bytes or the JSON that it came from anew: what is one character is in two halves",
        ) from None


@dataclass(frozen=True, slots=True)
class Encoding:
    """A text, or a pair of texts, as tokens."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """Begin and end of each token, in characters of its text."""
    sequence_ids: list[int | None]
    """0 for the first text, 1 for the second, None for special tokens."""
    tokens: list[str]
    """The vocabulary's spelling of each token."""


class TextStream:
    """Turns tokens into pieces of text as they come, never cutting a UTF-8 character in two.

    A piece is what a new token adds to the text of the last few tokens, which are decoded again with it because spacing
    depends on them. For well-formed text the pieces join to exactly what decoding all tokens at once gives. A byte
    fallback decoder (Llama 2) may judge a malformed run of bytes anew with every byte; what is out stays out.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        """The tokens of the last piece: the context of the next one."""
        self._pending: list[int] = []
        """Tokens since then, whose text is not certain yet."""

    def push(self, token: int) -> str:
        """The new text that is certain after this token; empty while a character is incomplete."""
        self._pending.append(token)
        piece = self._new_text()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._shown, self._pending = self._pending, []
        return piece

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for bytes that never became a character."""
        piece = self._new_text()
        self._shown, self._pending = self._pending, []
        return piece

    def _new_text(self) -> str:
        before: str = _call(self._tokenizer.decode, self._shown, skip_special_tokens=True)
        after: str = _call(self._tokenizer.decode, self._shown + self._pending, skip_special_tokens=True)
        return after[len(before) :]


class StopStream:
    """A :class:`TextStream` that ends before the first of some texts, wherever the borders of tokens lie.

    What may be the beginning of a stop text is held back until it is decided. Of several stop texts the one that is
    complete first counts, character by character, and of those that end together the longest: how the text is cut into
    tokens decides nothing.

    Args:
        stream: where the text comes from.
        stop: texts of at least one character.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str] = ()) -> None:
        self._stream = stream
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.matched: str | None = None
        """The stop text that ended the text; nothing is to be pushed after it."""

    def push(self, token: int) -> str:
        """The new text that is certain after this token."""
        return self._certain(self._stream.push(token), is_last=False)

    def finish(self) -> str:
        """What is left when no token follows; nothing after a stop text."""
        return self._certain(self._stream.finish(), is_last=True) if self.matched is None else ""

    def _certain(self, piece: str, *, is_last: bool) -> str:
        held = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self._held = ""
            return held[:at]
        kept = 0 if is_last else self._undecided(held)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def _undecided(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop text begins with."""
        lengths = range(min(self._longest - 1, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
