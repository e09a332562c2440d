"""Text to token ids and back, with the checkpoint's own ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Sequence
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
                "`tokenizer.json` is missing", details={"looked in": folder}, hint="give token ids instead: --tokens 1,2,3"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as err:  # noqa: BLE001 - the tokenizers library raises bare Exception
            raise ConfigError("`tokenizer.json` cannot be read", details={"file": path, "reason": err}) from err

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with the special tokens the tokenizer adds itself (a leading <s> in Llama)."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        """A decoder for tokens that arrive one by one."""
        return TextStream(self._tokenizer)


class TextStream:
    """Turns tokens into pieces of text as they come, never cutting a UTF-8 character in two.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``, whose ``DecodeStream`` keeps the context that spacing depends on.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The new text that is certain after this token; empty while a character is incomplete."""
        self._pending.append(token)
        piece: str | None = self._stream.step(self._tokenizer, token)
        if piece is None:
            return ""
        self._pending.clear()
        return piece

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for bytes that never became a character."""
        rest: str = self._tokenizer.decode(self._pending, skip_special_tokens=True)
        self._pending.clear()
        return rest
