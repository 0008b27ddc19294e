"""Linear layers of a batch: one product over all rows, and the numbers of the single rows."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwenvl_mlx.layers import linear
from qwenvl_mlx.layers.linear import add_linear, apply, keep_view

KINDS = ("plain", "biased", "quantised")


def layer_of(kind: str) -> nn.Module:
    mx.random.seed(0)
    layer = nn.Linear(64, 96, bias=kind == "biased")
    return layer.to_quantized(group_size=32, bits=4) if kind == "quantised" else layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 64), (1, 5, 64), (3, 1, 64), (3, 5, 64)])
def test_rows_of_a_batch_are_those_of_single_rows(kind: str, shape: tuple[int, ...]) -> None:
    layer, x = layer_of(kind), mx.random.normal(shape)
    residual = mx.random.normal((*shape[:-1], 96))
    one_by_one = mx.stack([layer(row) for row in x.reshape(-1, 1, 64)]).reshape(residual.shape)
    for given, wanted in (
        (apply(layer, x), one_by_one),
        (add_linear(residual, layer, x), residual + one_by_one),
    ):
        assert given.shape == wanted.shape
        np.testing.assert_allclose(given, wanted, atol=1e-5)  # float32: other shapes round differently


@pytest.mark.parametrize("kind", ["plain", "biased"])
def test_sums_see_a_batch_as_one_matrix(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    addmm = mx.addmm

    def watched(addend: mx.array, x: mx.array, weight: mx.array) -> Any:
        seen.append(x.ndim)
        return addmm(addend, x, weight)

    monkeypatch.setattr(mx, "addmm", watched)
    layer, x = layer_of(kind), mx.zeros((8, 1, 64))
    apply(layer, x)
    add_linear(mx.zeros((8, 1, 96)), layer, x)
    assert set(seen) == {2}


class Sum(nn.Linear):
    """A layer that does more than its weights say."""


@pytest.mark.parametrize(
    ("rows", "dtype", "kind", "device", "first"),
    [
        (15, mx.float32, nn.Linear, mx.cpu, False),
        (16, mx.float32, nn.Linear, mx.cpu, True),
        (511, mx.float32, nn.Linear, mx.cpu, True),
        (512, mx.float32, nn.Linear, mx.cpu, False),
        (64, mx.float32, nn.Linear, mx.gpu, False),
        (64, mx.bfloat16, nn.Linear, mx.cpu, False),
        (64, mx.float32, Sum, mx.cpu, False),
    ],
)
def test_few_rows_take_the_weights_first_on_a_cpu(
    rows: int, dtype: mx.Dtype, kind: type, device: Any, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = kind(64, 96, bias=False), mx.random.normal((1, rows, 64)).astype(dtype)
    layer.set_dtype(dtype)
    wanted, residual = layer(x), mx.random.normal((1, rows, 96)).astype(dtype)
    monkeypatch.setattr(mx, "default_device", lambda: device)
    monkeypatch.setattr(linear, "cores", lambda: 1)
    products: list[tuple[int, ...]] = []
    matmul, addmm = mx.array.__matmul__, mx.addmm

    def noted(left: mx.array, right: mx.array) -> mx.array:
        products.append(left.shape)
        return matmul(left, right)

    monkeypatch.setattr(mx.array, "__matmul__", noted)
    monkeypatch.setattr(mx, "addmm", lambda c, a, b: (products.append(a.shape), addmm(c, a, b))[1])
    given, added = apply(layer, x), add_linear(residual, layer, x)
    assert [shape == (96, 64) for shape in products[-2:]] == [first, first]
    tolerance = 1e-5 if dtype == mx.float32 else 0.02
    for ours, theirs in ((given, wanted), (added, residual + wanted)):
        np.testing.assert_allclose(ours.astype(mx.float32), theirs.astype(mx.float32), atol=tolerance)


@pytest.mark.parametrize("kind", ["plain", "biased"])
def test_a_view_that_was_kept_is_of_the_weights_that_the_layer_has(kind: str) -> None:
    layer, x = layer_of(kind), mx.random.normal((3, 64))
    keep_view(layer)
    assert mx.array_equal(apply(layer, x), layer(x))
    assert "_view" not in dict(tree_flatten(layer.parameters()))
    layer.weight = layer.weight + 1
    assert mx.array_equal(apply(layer, x), layer(x))
    assert mx.array_equal(add_linear(mx.zeros((3, 96)), layer, x), apply(layer, x))
