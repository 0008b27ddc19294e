"""The tokenizer of the original Qwen-VL: ``qwen.tiktoken``, 217 special tokens, and pictures named by their bytes.

One picture is ``<img>``, a fixed number of slots, ``</img>``. The slots hold the UTF-8 bytes of its path *as ids*
(not the BPE ids of the same characters) and ``<imgpad>`` for the rest.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from tokenizers import Tokenizer

from qwenvl_mlx.config import read_json
from qwenvl_mlx.errors import CheckpointError, PromptError
from qwenvl_mlx.processor.bpe_ranks import build_tokenizer, ids_of, read_ranks
from qwenvl_mlx.processor.detokenizer import ByteDetokenizer, byte_alphabet, piece_to_bytes

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"
PLACE_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE_TAGS = (*PLACE_TAGS, IMAGE_START, IMAGE_END, IMAGE_PAD)
CONTROLS = frozenset({END_OF_TEXT, IM_START, IM_END, IMAGE_START, IMAGE_END, IMAGE_PAD})
SPECIALS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{n}|>" for n in range(205)), *IMAGE_TAGS)


class Piece(NamedTuple):
    """A stretch of a prompt. The text of an image is its path or URL, without the tags."""

    kind: Literal["text", "special", "image"]
    text: str


def tokenizer_json(tiktoken: Path) -> str:
    """The content of a ``tokenizer.json`` for a ``qwen.tiktoken``; the special tokens follow its ranks."""
    text: str = build_tokenizer(read_ranks(tiktoken), SPECIALS).to_str()
    return text


def split(text: str, specials: Iterable[str] = SPECIALS) -> Iterator[Piece]:
    """Cut an NFC text at the special tokens among ``specials``, pictures as one piece. Raises ``PromptError``."""
    parts = re.split(f"({'|'.join(map(re.escape, specials))})", text)
    at = 0
    while at < len(parts):
        part, special = parts[at], at % 2 == 1  # re.split: text and separators take turns
        if special and part == IMAGE_START:
            at = _closing(parts, at)
            yield Piece("image", parts[at - 1])
        elif part:
            yield Piece("special" if special else "text", part)
        at += 1


def normal_form(text: str) -> str:
    """NFC, and a lone surrogate as U+FFFD."""
    text = unicodedata.normalize("NFC", text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class QwenTokenizer:
    """Text to ids and back, equal to the reference's. ``image_slots``: ids between the tags of one picture."""

    def __init__(self, backend: Tokenizer, *, image_slots: int = 256) -> None:
        self._backend = backend
        self._backend.encode_special_tokens = (
            True  # special tokens are told apart here, by what each text may contain
        )
        self._alphabet = byte_alphabet()
        self.image_slots = image_slots
        self._ids = {name: self._special(name) for name in SPECIALS}
        self.end_of_text, self.im_start, self.im_end = (self._ids[name] for name in SPECIALS[:3])
        self._names = {number: name for name, number in self._ids.items()}
        if sorted(self._names) != list(range(self.end_of_text, self.end_of_text + len(SPECIALS))):
            raise CheckpointError(
                "tokenizer.json does not number Qwen-VL's special tokens in order: convert again"
            )

    @classmethod
    def from_folder(cls, folder: Path, *, image_slots: int = 256) -> QwenTokenizer:
        """From ``tokenizer.json``, else from ``qwen.tiktoken`` (which takes a second or two)."""
        path = folder / "tokenizer.json"
        if not path.exists():
            return cls(
                build_tokenizer(read_ranks(folder / "qwen.tiktoken"), SPECIALS), image_slots=image_slots
            )
        read_json(path)  # a damaged file is named here: the library's own error has no class and no name
        backend = Tokenizer.from_file(str(path))
        return cls(backend, image_slots=image_slots)

    def id(self, token: str) -> int | None:
        return self._ids.get(token)

    def to_json(self) -> str:
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str) -> list[int]:
        """All special tokens are recognised; a picture's path must fit its slots. Raises ``PromptError``."""
        return self._encode(text, SPECIALS)

    def encode_content(self, text: str) -> list[int]:
        """What a person or the model wrote: only the tags of pictures and places are special in it."""
        return self._encode(text, IMAGE_TAGS)

    def encode_piece(self, piece: Piece) -> list[int]:
        if piece.kind == "image":
            return self.encode_image(piece.text)
        if piece.kind == "special":
            return [self._ids[piece.text]]
        return ids_of(self._backend, piece.text)

    def encode_image(self, path: str = "") -> list[int]:
        """Tags and slots of one picture."""
        slots = list(path.encode())
        if len(slots) > self.image_slots:
            raise PromptError(
                f"the path of a picture has {len(slots)} bytes and only {self.image_slots} fit: shorten it"
            )
        slots += [self._ids[IMAGE_PAD]] * (self.image_slots - len(slots))
        return [self._ids[IMAGE_START], *slots, self._ids[IMAGE_END]]

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special: bool = True,
        keep_tags: bool = False,
        errors: Literal["replace", "ignore", "strict"] = "replace",
    ) -> str:
        """Text of ids, the path of a picture between its tags.

        ``skip_special`` leaves out special tokens (a picture's path stays), with ``keep_tags`` those of places stay.
        Raises ``PromptError`` for ids that are no token and pictures that are not closed.
        """
        kept = frozenset(PLACE_TAGS if keep_tags else ()) if skip_special else frozenset(SPECIALS)
        try:
            return b"".join(self._decoded(ids, kept)).decode(errors=errors)
        except UnicodeDecodeError as error:
            raise PromptError(
                f"the tokens are not whole characters ({error.reason}): decode more of them"
            ) from error

    def detokenizer(self, *, skip_special: bool = True) -> ByteDetokenizer:
        """Streams an answer. Nothing that a model may sample raises: ids without a token write nothing.

        ``skip_special`` leaves out control tokens; unused ``<|extra_n|>`` are written as in the reference's chat.
        """
        kept = frozenset(SPECIALS) - (CONTROLS if skip_special else frozenset())
        last = self.end_of_text + len(SPECIALS)
        return ByteDetokenizer(lambda token: self._token_bytes(token, kept) if 0 <= token < last else b"")

    def _encode(self, text: str, specials: Iterable[str]) -> list[int]:
        return [number for piece in split(normal_form(text), specials) for number in self.encode_piece(piece)]

    def _decoded(self, ids: Sequence[int], kept: frozenset[str]) -> Iterator[bytes]:
        start, end = self._ids[IMAGE_START], self._ids[IMAGE_END]
        at = 0
        while at < len(ids):
            yield self._token_bytes(ids[at], kept)
            if ids[at] == start:
                if end not in ids[at:]:
                    raise PromptError("a picture is not closed by </img>: decode the whole answer")
                close = list(ids).index(end, at)
                yield self._path_of(ids[at + 1 : close])
                at = close - 1
            at += 1

    def _path_of(self, slots: Sequence[int]) -> bytes:
        try:
            path = bytes(slots[: list(slots).index(self._ids[IMAGE_PAD])])
            text = path.decode()
        except ValueError as error:
            raise PromptError(
                f"the slots of a picture hold no path ({error}): they must be bytes and <imgpad>"
            ) from error
        if any(name in text for name in SPECIALS):
            raise PromptError(f"the path of a picture holds a special token: {text!r}")
        return path

    def _token_bytes(self, token: int, kept: frozenset[str]) -> bytes:
        name = self._names.get(token)
        if name is not None:
            return name.encode() if name in kept else b""
        piece = self._backend.id_to_token(token) if token >= 0 else None
        if piece is None:
            raise PromptError(
                f"{token} is not a token: ids go from 0 to {self.end_of_text + len(SPECIALS) - 1}"
            )
        return piece_to_bytes(piece, self._alphabet)

    def _special(self, name: str) -> int:
        number: int | None = self._backend.token_to_id(name)
        if number is None:
            raise CheckpointError(
                f"the tokenizer lacks {name}: is this the tokenizer of the original Qwen-VL?"
            )
        return number


def _closing(parts: Sequence[str], at: int) -> int:
    """Index of the ``</img>`` that ends the picture starting at ``at``."""
    try:
        end = parts.index(IMAGE_END, at)
    except ValueError:
        raise PromptError("<img> without </img>: write <img>path</img>") from None
    if end != at + 2:
        raise PromptError(
            f"a special token ({parts[at + 2]}) inside <img>…</img>: only a path may stand there"
        )
    return end
