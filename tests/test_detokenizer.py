"""Streamed pieces joined equal the whole decoded at once, whatever the tokens, and no piece ends inside a character."""

from __future__ import annotations

import random

from tokenizers import pre_tokenizers

from qwenvl_mlx.processor.detokenizer import ByteDetokenizer, byte_alphabet, piece_to_bytes


def stream(pieces: list[bytes]) -> list[str]:
    detokenizer = ByteDetokenizer(lambda token: pieces[token])
    return [*(detokenizer.add(token) for token in range(len(pieces))), detokenizer.finish()]


def test_random_bytes_stream_to_the_same_text() -> None:
    rng = random.Random(0)
    letters = "aé中😀👩‍🚀\u0301".encode()
    for _ in range(300):
        data = letters if rng.random() < 0.3 else rng.randbytes(rng.randrange(30))
        data = (
            data * 2
            if rng.random() < 0.5
            else bytes(rng.choice((data or b"\xe4") + letters) for _ in range(20))
        )
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(6))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert "".join(stream(pieces)) == data.decode(errors="replace")


def test_a_character_comes_whole() -> None:
    assert stream([bytes([byte]) for byte in "é😀".encode()]) == ["", "é", "", "", "", "😀", ""]
    assert stream([b"a\xf0\x9f", b"x", b"\xe4\xb8"]) == ["a", "�x", "", "�"]


def test_the_alphabet_is_that_of_byte_level_vocabularies() -> None:
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    [(written, _)] = level.pre_tokenize_str("中 \n\x00é~")
    assert piece_to_bytes(written, byte_alphabet()) == "中 \n\x00é~".encode()
    assert piece_to_bytes("中 <think>", byte_alphabet()) == "中 <think>".encode()
