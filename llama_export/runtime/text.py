"""Text to token ids and back, with the checkpoint's own ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_export.errors import ConfigError


class TextCodec:
    """The tokenizer of a bundle.

    Args:
        folder: bundle or checkpoint that holds ``tokenizer.json``.

    Raises:
        ConfigError: it is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                "`tokenizer.json` is missing",
                details={"looked in": folder},
                hint="give token ids instead: --tokens 1,2,3",
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as err:
            raise ConfigError(
                "`tokenizer.json` cannot be read",
                details={"file": path, "reason": err},
                hint="copy the checkpoint's own again, or give token ids instead: --tokens 1,2,3",
            ) from err

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with the special tokens the tokenizer adds itself (a leading <s> in Llama)."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def encode_with_offsets(self, text: str, pair: str | None = None) -> Encoding:
        """Token ids, and where in the text each token lies; ``pair`` is a second text (a question's context)."""
        found = self._tokenizer.encode(text, pair)
        return Encoding(list(found.ids), list(found.offsets), list(found.sequence_ids), list(found.tokens))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def text_of(self, token: int) -> str:
        """What one token adds to a text, its leading space included; a special token's name."""
        once, twice = (self._tokenizer.decode([token] * count, skip_special_tokens=False) for count in (1, 2))
        added: str = twice[len(once) :]  # the first token of a text may lose its space
        return added

    def stream(self) -> TextStream:
        """A decoder for tokens that arrive one by one."""
        return TextStream(self._tokenizer)


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
        before: str = self._tokenizer.decode(self._shown, skip_special_tokens=True)
        after: str = self._tokenizer.decode(self._shown + self._pending, skip_special_tokens=True)
        return after[len(before) :]
