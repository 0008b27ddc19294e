"""A ``.tiktoken`` vocabulary (ranked byte sequences) as a tokenizer of the ``tokenizers`` library."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from qwenvl_mlx.errors import CheckpointError
from qwenvl_mlx.processor.detokenizer import byte_alphabet

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_ranks(path: Path) -> dict[bytes, int]:
    """The lines "base64 rank" of a file. Raises ``CheckpointError`` if they are damaged or incomplete."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: copy it from the original checkpoint") from None
    except (OSError, ValueError, binascii.Error) as error:
        raise CheckpointError(f"{path} can't be read ({error}): fetch it again") from error
    bytes_known = all(bytes([value]) in ranks for value in range(256))
    if not bytes_known or sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path} has gaps in its ranks: fetch it again")
    return ranks


def build_tokenizer(ranks: Mapping[bytes, int], specials: Sequence[str], *, split: str = SPLIT) -> Tokenizer:
    """Byte-level BPE with these ranks; ``specials`` get the ids that follow; ``split``: what cuts text into words."""
    names = {value: character for character, value in byte_alphabet().items()}
    written = {token: "".join(names[value] for value in token) for token in ranks}
    merges = [(written[left], written[right]) for left, right in _merges(ranks)]
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    # ignore_merges: a whole word that has a rank is one token, as in tiktoken
    tokenizer = byte_level(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True), split=split)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    return tokenizer


def byte_level(model: models.BPE, *, split: str = SPLIT) -> Tokenizer:
    """A tokenizer around ``model`` that normalises to NFC, cuts at ``split`` and speaks in bytes."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def ids_of(backend: Tokenizer, text: str) -> list[int]:
    """The ids of a text. Other threads run meanwhile: the library's ``encode`` would stop them all, for seconds."""
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token was merged from, in order of rank.

    Merging a token's bytes by lower ranks alone leaves that pair. No other split of the token can arise inside a
    word: as long as nothing crosses the token's borders, its inside is merged in the same order.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            cut = _last_cut(token, rank, ranks)
            if (
                cut is not None
            ):  # a few tokens of Qwen3.5 can't be merged: they are reached as whole words only
                pairs.append((token[:cut], token[cut:]))
    return pairs


def _last_cut(token: bytes, limit: int, ranks: Mapping[bytes, int]) -> int | None:
    """Where the last two parts meet after the token's bytes were merged by ranks below ``limit``, lowest first."""
    cuts = list(range(len(token) + 1))
    found = [
        ranks.get(token[i : i + 2], limit) for i in range(len(token) - 1)
    ]  # rank of each neighbouring pair
    while len(found) > 1:
        lowest = min(found)
        if lowest >= limit:
            return None
        at = found.index(lowest)
        del cuts[at + 1], found[at]
        if at > 0:
            found[at - 1] = ranks.get(token[cuts[at - 1] : cuts[at + 1]], limit)
        if at < len(found):
            found[at] = ranks.get(token[cuts[at] : cuts[at + 2]], limit)
    return cuts[1]
