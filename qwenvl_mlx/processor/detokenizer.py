"""Turn tokens into text while they come, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable


def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies write the 256 bytes (GPT-2's table).

    Printable bytes stand for themselves, all others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def piece_to_bytes(piece: str, alphabet: dict[str, int]) -> bytes:
    """A token of a byte-level vocabulary as bytes; a token added as plain text, such as ``<think>`` or 你, as UTF-8."""
    try:
        return bytes([alphabet[character] for character in piece])
    except KeyError:
        return piece.encode()


class ByteDetokenizer:
    """Streams the text of one answer: each token costs the same, however long the answer is.

    ``token_bytes`` gives what a token writes: ``b""`` for one that is to be skipped. An unfinished character is held
    back until its last byte comes; bytes that can't become one give U+FFFD, so that the pieces joined equal the
    whole decoded at once.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
