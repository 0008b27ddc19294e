"""The text of single tokens, for log-probabilities."""

from __future__ import annotations

from qwenvl_mlx.processor.base import Tokenizer


class Speller:
    """Token id -> its text, special tokens by their names, a part of a character as U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, token: int) -> str:
        reader = self._tokenizer.detokenizer(skip_special=False)
        return reader.add(token) + reader.finish()
