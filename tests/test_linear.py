"""Linear layers of a batch: one product over all rows, and the numbers of the single rows."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from qwenvl_mlx.layers.linear import add_linear, apply

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
