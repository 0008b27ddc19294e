"""RMS norm whose weight may be more exact than the stream that it scales."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn


@partial(mx.compile, shapeless=True)
def _scale(x: mx.array, weight: mx.array) -> mx.array:
    return (x * weight).astype(x.dtype)


class RMSNorm(nn.Module):
    """As ``nn.RMSNorm``, but the result keeps the type of ``x`` where the weight has another (Qwen3.5: float32)."""

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        if self.weight.dtype == x.dtype:
            return mx.fast.rms_norm(x, self.weight, self.eps)
        return _scale(mx.fast.rms_norm(x, None, self.eps), self.weight)
