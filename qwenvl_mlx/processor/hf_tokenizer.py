"""The tokenizer of Qwen2-VL and later: byte-level BPE from whatever files a checkpoint carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from qwenvl_mlx.config import read_json
from qwenvl_mlx.errors import CheckpointError
from qwenvl_mlx.processor.bpe_ranks import SPLIT, build_tokenizer, byte_level, ids_of, read_ranks
from qwenvl_mlx.processor.detokenizer import ByteDetokenizer, byte_alphabet, piece_to_bytes

PLACE_TAGS = frozenset(
    f"<|{place}_{end}|>" for place in ("object_ref", "box", "quad") for end in ("start", "end")
)


class HFTokenizer:
    """Text to ids and back, equal to transformers'. Ids past the vocabulary (padding of the head) write nothing."""

    def __init__(self, backend: Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._alphabet = byte_alphabet()
        self._added: dict[int, AddedToken] = backend.get_added_tokens_decoder()

    @classmethod
    def from_folder(cls, folder: Path) -> HFTokenizer:
        """From ``tokenizer.json``, else from ``vocab.json`` and ``merges.txt``, else from a ``.tiktoken`` file.

        Tokens that ``tokenizer_config.json`` adds are added. Raises ``CheckpointError``.
        """
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        backend = _backend(folder, config.get("pretokenize_regex") or SPLIT)
        _add_tokens(backend, _added_tokens(folder, config), folder)
        return cls(backend)

    def id(self, token: str) -> int | None:
        number: int | None = self._backend.token_to_id(token)
        return number

    def to_json(self) -> str:
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str) -> list[int]:
        """Special tokens are recognised wherever they stand. A lone surrogate becomes U+FFFD."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return ids_of(self._backend, text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        text: str = self._backend.decode([i for i in ids if i >= 0], skip_special_tokens=skip_special)
        return text

    def detokenizer(self, *, skip_special: bool = True) -> ByteDetokenizer:
        """Streams an answer. Unlike ``decode``, it keeps the tags of places in any case: they are the answer."""
        return ByteDetokenizer(lambda token: self._token_bytes(token, skip_special=skip_special))

    def _token_bytes(self, token: int, *, skip_special: bool) -> bytes:
        added = self._added.get(token)
        if added is not None:
            skipped = skip_special and added.special and added.content not in PLACE_TAGS
            return b"" if skipped else added.content.encode()
        piece = self._backend.id_to_token(token) if token >= 0 else None
        return b"" if piece is None else piece_to_bytes(piece, self._alphabet)


def _backend(folder: Path, split: str) -> Tokenizer:
    path = folder / "tokenizer.json"
    if path.is_file():
        model = read_json(path).get("model")  # damage is named here: the library's own errors have no class
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
            raise CheckpointError(f"{path} holds no vocabulary: copy it from the original checkpoint")
        return Tokenizer.from_file(str(path))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _from_merges(read_json(folder / "vocab.json"), folder / "merges.txt", split)
    ranked = sorted(folder.glob("*.tiktoken"))
    if not ranked:
        raise CheckpointError(f"{folder} has no tokenizer.json: copy it from the original checkpoint")
    return build_tokenizer(read_ranks(ranked[0]), (), split=split)


def _from_merges(vocabulary: Mapping[str, Any], merges: Path, split: str) -> Tokenizer:
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{merges} can't be read ({error}): fetch it again") from error
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines if _is_merge(line))]
    if not all(left + right in vocabulary for left, right in pairs):
        raise CheckpointError(f"{merges} does not fit vocab.json: fetch both again")
    return byte_level(models.BPE(dict(vocabulary), pairs, fuse_unk=False), split=split)


def _is_merge(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#version")


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens beside the vocabulary by id, from ``tokenizer_config.json`` or the older ``added_tokens.json``."""
    listed = config.get("added_tokens_decoder")
    if listed is not None:
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return {
            int(number): AddedToken(token["content"], **{flag: bool(token.get(flag)) for flag in flags})
            for number, token in listed.items()
        }
    path = folder / "added_tokens.json"
    if not path.is_file():
        return {}
    return {
        int(number): AddedToken(content, normalized=False, special=content.startswith("<|"))
        for content, number in read_json(path).items()
    }


def _add_tokens(backend: Tokenizer, added: Mapping[int, AddedToken], folder: Path) -> None:
    for number, token in sorted(added.items()):
        if backend.token_to_id(token.content) is None:
            add = backend.add_special_tokens if token.special else backend.add_tokens
            add([token])
        if backend.token_to_id(token.content) != number:
            raise CheckpointError(
                f"{folder}: {token.content} should be token {number} but the vocabulary ends elsewhere: "
                "fetch the tokenizer's files again"
            )
