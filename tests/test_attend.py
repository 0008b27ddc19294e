"""Attention and exp as a CPU computes them agree with MLX's own, whatever the pieces."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qwenvl_mlx.layers import fused
from qwenvl_mlx.layers.exponential import exp2_below, swish
from qwenvl_mlx.layers.fused import NEVER, attend
from qwenvl_mlx.layers.mlp import gated
from qwenvl_mlx.layers.vision import ACTIVATIONS

# batch, heads, kv heads, queries, keys, head size
SHAPES = (
    (1, 4, 4, 50, 50, 80),
    (5, 2, 2, 16, 16, 64),
    (2, 6, 2, 33, 70, 32),
    (1, 3, 3, 9, 21, 24),
    (1, 2, 1, 1, 40, 64),
)


def tensors(shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    batch, heads, kv_heads, queries, keys, size = shape
    mx.random.seed(0)
    lengths = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    drawn = [mx.random.normal((batch, length, count, size)) for count, length in lengths]
    return [x.transpose(0, 2, 1, 3).astype(dtype) for x in drawn]


@pytest.mark.parametrize("piece", [1, 300, 5000, 1 << 18])
@pytest.mark.parametrize("keys_at_once", [7, 512])
@pytest.mark.parametrize("kind", ["none", "causal", "rows", "batch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_give_what_the_whole_gives(
    shape: tuple[int, ...], kind: str, keys_at_once: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, _, _, queries, keys, _ = shape
    mask: mx.array | str | None = None if kind == "none" else "causal"
    if kind in ("rows", "batch"):
        mask = mx.random.uniform(shape=(queries, keys) if kind == "rows" else (batch, 1, 1, keys)) < 0.7
        mask[..., 0] = True
    q, k, v = tensors(shape)
    whole = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    monkeypatch.setattr(fused, "PIECE", piece)
    monkeypatch.setattr(fused, "KEYS", keys_at_once)
    found = attend(q, k, v, scale=0.3, mask=mask)
    assert found.shape == whole.shape
    assert mx.abs(found - whole).max() < 1e-5  # mx.exp is 4e-6 away from the truth


def test_half_types_come_back() -> None:
    q, k, v = tensors(SHAPES[0], mx.bfloat16)
    found = attend(q, k, v, scale=0.3)
    assert found.dtype == mx.bfloat16
    exact = mx.fast.scaled_dot_product_attention(*(x.astype(mx.float32) for x in (q, k, v)), scale=0.3)
    assert mx.abs(found - exact).max() < 0.01


def test_scores_never_stand_in_memory_whole() -> None:
    q, k, v = tensors((1, 8, 8, 2000, 2000, 32))
    mx.eval(q, k, v)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(attend(q, k, v, scale=0.1))
    assert mx.get_peak_memory() - before < 8 * 2000 * 2000 * 4 / 2


def test_a_gpu_gets_one_fused_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(q: mx.array, k: mx.array, v: mx.array, **options: object) -> mx.array:
        calls.append(options)
        return q

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    q, k, v = tensors((1, 8, 8, 3000, 3000, 16))
    attend(q, k, v, scale=0.1, mask="causal")
    assert calls == [{"scale": 0.1, "mask": "causal"}]


def test_powers_are_exact_and_have_ends() -> None:
    x = np.linspace(-126, 0, 100_001).astype(np.float16).astype(np.float32)  # so that differences are exact
    for top in (0.0, 3.0):
        found = np.array(exp2_below(mx.array(x + top), mx.array([top])))
        assert np.abs(found / np.exp2(x.astype(np.float64)) - 1).max() < 2e-7
    x[:6] = [NEVER, -4e6, -1000, -200, -128, 0]
    np.testing.assert_array_equal(np.array(exp2_below(mx.array(x), mx.array([0.0])))[:6], [0, 0, 0, 0, 0, 1])
    small = np.array(exp2_below(mx.array(x[-100:]), mx.array([0.0])))
    np.testing.assert_allclose(small, np.exp2(x[-100:]), rtol=1e-6)


def test_swish_is_exact_and_has_ends() -> None:
    x = np.linspace(-80, 80, 100_001, dtype=np.float32)
    truth = x / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(np.array(swish(mx.array(x))), truth, rtol=5e-6, atol=1e-7)
    ends = np.array(swish(mx.array([-1e9, -100.0, 0.0, 100.0, 1e9, np.inf, np.nan])))
    np.testing.assert_allclose(ends, [0, 0, 0, 100, np.float32(1e9), np.inf, np.nan], rtol=0, atol=1e-28)


@pytest.mark.parametrize("name", ["quick_gelu", "gelu_pytorch_tanh"])
def test_activations_are_the_same_for_small_and_large_arrays(name: str) -> None:
    """Large ones take another way on some processors."""
    large = mx.random.normal((300, 300)) * 5
    activation = ACTIVATIONS[name]
    rows = mx.concatenate([activation(row[None]) for row in large])
    assert mx.abs(activation(large) - rows).max() < 1e-4  # of numbers up to 20
    assert (
        mx.abs(gated(large, large) - mx.concatenate([gated(row[None], row[None]) for row in large])).max()
        < 2e-3
    )
