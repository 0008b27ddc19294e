"""Count what one lazily built MLX graph would cost on Metal, on any machine: kernels launched and bytes moved.

    with metal_view():                     # before the model is built: mx.fast.* appear as one primitive each
        print(count(lambda token: model.decode(token, cache), token))

Two walks are made. The un-evaluated graph (``mx.export_to_dot``) gives the primitives that an eager run schedules, and
so the launches. The exported function (``mx.export_function``) gives shapes, strides and types, and so the bytes, and
the copies that a strided operand costs.

Launches (mlx 0.32, Metal): none for views; one for an ordinary primitive; Concatenate one per input, Pad and
Convolution 2, DynamicSlice 2, DynamicSliceUpdate 3. A strided operand of a matrix product or of a fused kernel that
can't read it in place costs one copy more.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwenvl_mlx.layers.mlx_lm import leaf

RESHAPES = frozenset({"Reshape", "Flatten", "Unflatten"})
SHAPES = frozenset(
    {"Transpose", "ExpandDims", "Squeeze", "Broadcast", "BroadcastAxes", "Slice", "Split", "AsStrided"}
)
NOTHING = frozenset(
    {"View", "Copy", "StopGradient", "CustomTransforms", "Load", "NumberOfElements", "Contiguous"}
)
VIEWS = RESHAPES | SHAPES | NOTHING
LAUNCHES = {"Pad": 2, "Convolution": 2, "DynamicSlice": 2, "DynamicSliceUpdate": 3}
FUSED = {
    770001: "RMSNorm",
    770002: "LayerNorm",
    770003: "RoPE",
    770004: "SDPA",
    770005: "Dequantize",
    770006: "GatedDelta",
    770007: "Contiguous",
}
TAGS = {name: tag for tag, name in FUSED.items()}
PRODUCTS = ("Matmul", "QuantizedMatmul", "AddMM")
GATHERED = ("GatherMM", "GatherQMM")  # products with chosen experts
UPDATES = ("SliceUpdate", "DynamicSliceUpdate")  # in place

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """``launches``: kernels; ``copies``: those among them that only straighten strides; bytes as read and written.

    ``nodes``: what the host builds, views too. ``flops``: of products, two for each multiplication and sum; a causal
    mask saves nothing.
    """

    launches: int
    nodes: int
    copies: int
    weight_bytes: int
    bytes_moved: int
    flops: int
    by_primitive: dict[str, int]


@contextlib.contextmanager
def metal_view() -> Iterator[None]:
    """Make the fused operations single primitives, as they are on Metal; on the CPU they decompose into many."""

    def mark(kind: str, x: mx.array, others: list[Any]) -> mx.array:
        arrays = [item for item in others if isinstance(item, mx.array)]
        return mx.depends(x, [*arrays, mx.array(TAGS[kind], mx.int32)])

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
        return mark("RMSNorm", x, [weight])

    def layer_norm(x: mx.array, weight: Any, bias: Any, eps: float, **_: Any) -> mx.array:
        return mark("LayerNorm", x, [weight, bias])

    def rope(a: mx.array, dims: int, *, offset: Any = 0, freqs: Any = None, **_: Any) -> mx.array:
        return mark("RoPE", a, [offset, freqs])

    def attention(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **_: Any) -> mx.array:
        return mark("SDPA", q[..., : v.shape[-1]], [k, v, mask])

    def dequantize(w: mx.array, scales: mx.array, biases: mx.array | None = None, **options: Any) -> mx.array:
        made = mx.zeros((*w.shape[:-1], scales.shape[-1] * options["group_size"]), scales.dtype)
        mx.eval(made)
        return mark("Dequantize", made, [w, scales, biases])

    def delta_rule(q: mx.array, k: mx.array, v: mx.array, *others: Any) -> tuple[mx.array, mx.array]:
        *gates, state, mask = others
        arrays = [item for item in (q, k, *gates, mask) if item is not None]
        return tuple(mx.depends([v, state], [*arrays, mx.array(TAGS["GatedDelta"], mx.int32)]))

    def contiguous(x: mx.array, **_: Any) -> mx.array:
        return mark("Contiguous", x, [])

    stand_ins: list[tuple[Any, str, Callable[..., Any]]] = [
        (mx.fast, "rms_norm", rms_norm),
        (mx.fast, "layer_norm", layer_norm),
        (mx.fast, "rope", rope),
        (mx.fast, "scaled_dot_product_attention", attention),
        (mx, "default_device", lambda: mx.Device(mx.gpu)),
        (mx, "dequantize", dequantize),
        (mx, "contiguous", contiguous),
        (leaf("models.gated_delta"), "gated_delta_ops", delta_rule),
    ]
    before = [getattr(place, name) for place, name, _ in stand_ins]
    for place, name, stand_in in stand_ins:
        setattr(place, name, stand_in)
    try:
        yield
    finally:
        for (place, name, _), original in zip(stand_ins, before, strict=True):
            setattr(place, name, original)


def count(function: Callable[..., Any], *arguments: mx.array) -> Cost:
    """The cost of ``function(*arguments)``: ``arguments`` are evaluated arrays, everything else counts as constant."""
    eager, nodes = _eager_launches(_flat(function(*arguments)))
    trace = _Trace()
    mx.disable_compile()
    try:
        records: list[dict[str, Any]] = []
        mx.export_function(records.append, lambda *a: tuple(_flat(function(*a))), *arguments)
    finally:
        mx.enable_compile()
    trace.read(records)
    return Cost(
        launches=sum(eager.values()) + trace.copies,
        nodes=nodes,
        copies=trace.copies,
        weight_bytes=trace.weight_bytes,
        bytes_moved=trace.bytes_moved,
        flops=trace.flops,
        by_primitive=dict(eager.most_common()),
    )


def _flat(outputs: Any) -> list[mx.array]:
    if isinstance(outputs, mx.array):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    return [array for item in outputs for array in _flat(item)] if isinstance(outputs, (list, tuple)) else []


def _eager_launches(outputs: list[mx.array]) -> tuple[collections.Counter[str], int]:
    """Launches of each primitive, and nodes of the graph."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *outputs)
        text = path.read_text()
    labels = dict(re.findall(r'\{ (\d+) \[label ="([^"]+)"', text))
    inputs = collections.Counter(re.findall(r"-> (\d+)$", text, re.M))
    outs = collections.Counter(re.findall(r'^(\d+) -> "', text, re.M))
    launches: collections.Counter[str] = collections.Counter()
    for node, name in labels.items():
        times = 1 if name in ("Split", "CustomTransforms", "DivMod", "Depends") else max(1, outs[node])
        if name in VIEWS:
            continue
        kind = "Fused" if name == "Depends" else "Compiled" if name.startswith("Compiled") else name
        launches[kind] += inputs[node] if name == "Concatenate" else times * LAUNCHES.get(name, 1)
    return launches, len(labels)


class _Trace:
    """Follows shapes and strides through an exported function."""

    def __init__(self) -> None:
        self.strides: dict[str, Shape] = {}
        self.constants: dict[str, mx.array] = {}
        self.tags: dict[str, str] = {}
        self.counted: set[str] = set()
        self.copies = self.weight_bytes = self.bytes_moved = self.flops = 0

    def read(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if record["type"] == "constants":
                for name, array in record["constants"]:
                    self.constants[name] = array
                    if array.size == 1 and array.dtype == mx.int32 and int(array.item()) in FUSED:
                        self.tags[name] = FUSED[int(array.item())]
        for record in records:
            if record["type"] == "primitive":
                self._primitive(record["name"], record["inputs"], record["outputs"], record["arguments"])

    def _of(self, tensor: Any) -> Shape:
        return self.strides.get(tensor[0], _row_major(tensor[1]))

    def _primitive(self, name: str, inputs: list[Any], outputs: list[Any], arguments: Any) -> None:
        for tensor in outputs:
            self.strides[tensor[0]] = _row_major(tensor[1])
        first = inputs[0] if inputs else None
        launched = name not in VIEWS
        if name == "Depends":
            kind = next((self.tags[tensor[0]] for tensor in inputs if tensor[0] in self.tags), None)
            inputs = [tensor for tensor in inputs if tensor[0] not in self.tags]
            launched = kind is not None
            self._fused(kind, first, outputs)
            if kind == "SDPA":  # with the keys, then with the values
                self.flops += 4 * math.prod(outputs[0][1]) * inputs[1][1][-2]
        elif not launched:
            launched = self._view(name, first, outputs, arguments)
        if name in (*PRODUCTS, *GATHERED):
            self.flops += 2 * math.prod(outputs[0][1]) * first[1][-1]
        if name in PRODUCTS and not self._readable(name, first):
            self.copies += 1
        if launched:
            self._move(name, inputs, outputs)

    def _view(self, name: str, first: Any, outputs: list[Any], arguments: Any) -> bool:
        """Strides of a view; True when a reshape can't be one and copies."""
        strides, shape, out = self._of(first), first[1], outputs[0][1]
        if name == "Transpose":
            self.strides[outputs[0][0]] = tuple(strides[axis] for axis in arguments[0])
            if first[0] in self.constants:  # a weight seen through its transpose is still that weight
                self.constants[outputs[0][0]] = self.constants[first[0]]
        elif name in RESHAPES:
            new = _reshaped(shape, strides, out)
            if new is None:
                self.copies += 1
                return True
            self.strides[outputs[0][0]] = new
        elif name in ("ExpandDims", "Squeeze"):
            self.strides[outputs[0][0]] = _reshaped(shape, strides, out) or _row_major(out)
        elif name in ("Broadcast", "BroadcastAxes"):
            extra = len(out) - len(shape)
            kept = (0 if a == 1 != b else s for a, b, s in zip(shape, out[extra:], strides, strict=True))
            self.strides[outputs[0][0]] = (0,) * extra + tuple(kept)
        elif name == "Slice":
            steps = arguments[2] if len(arguments) > 2 else (1,) * len(shape)
            self.strides[outputs[0][0]] = tuple(s * step for s, step in zip(strides, steps, strict=True))
        elif name == "Split":
            for tensor in outputs:
                self.strides[tensor[0]] = strides
        return False

    def _fused(self, kind: str | None, first: Any, outputs: list[Any]) -> None:
        shape, strides = first[1], self._of(first)
        if kind == "SDPA" and outputs[0][1][2] > 8:  # written as (batch, length, heads, size)
            _, heads, length, size = outputs[0][1]
            self.strides[outputs[0][0]] = (length * heads * size, size, heads * size, 1)
        if kind == "RMSNorm" and not _is_row_major(shape, strides):
            self.copies += 1
        if kind == "RoPE" and not _is_row_major(shape, strides):
            lead = len(shape)
            while lead > 3 and shape[len(shape) - lead] == 1:
                lead -= 1
            length, size, heads = shape[-2], shape[-1], math.prod(shape[1:-2])
            in_place = len(shape) == 4 and strides[:3] == (length * heads * size, size, heads * size)
            self.copies += not (lead == 3 or in_place)

    def _readable(self, name: str, first: Any) -> bool:
        shape, strides = first[1], self._of(first)
        if _is_row_major(shape, strides):
            return True
        if name == "QuantizedMatmul" or len(strides) < 2:
            return False
        by_row = strides[-1] == 1 and strides[-2] == shape[-1]
        return bool(by_row or (strides[-2] == 1 and strides[-1] == shape[-2]))

    def _move(self, name: str, inputs: list[Any], outputs: list[Any]) -> None:
        written = sum(_nbytes(tensor) for tensor in outputs)
        for index, tensor in enumerate(inputs):
            if index == 0 and name in ("Gather", "GatherAxis"):
                self.bytes_moved += written
                continue
            if index == 0 and name in UPDATES:
                continue
            # a broadcast operand is read at its own size
            items = math.prod(d for d, s in zip(tensor[1], self._of(tensor), strict=True) if s)
            self.bytes_moved += items * tensor[2].size
            constant = self.constants.get(tensor[0])
            if constant is not None and constant.size > 1 and tensor[0] not in self.counted:
                self.counted.add(tensor[0])
                self.weight_bytes += constant.nbytes
        self.bytes_moved += _nbytes(inputs[1]) if name in UPDATES else written


def _nbytes(tensor: Any) -> int:
    return int(math.prod(tensor[1]) * tensor[2].size)


def _row_major(shape: Shape) -> Shape:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def _is_row_major(shape: Shape, strides: Shape) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _reshaped(shape: Shape, strides: Shape, new: Shape) -> Shape | None:
    """Strides of a reshape without a copy, or None where there is none: runs of axes must stay contiguous."""
    old = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    result = [0] * len(new)
    taken = 0
    axis = 0
    while axis < len(new) and taken < len(old):
        end, until = axis + 1, taken + 1
        target, have = new[axis], old[taken][0]
        while target != have:
            if target < have:
                target *= new[end]
                end += 1
            else:
                have *= old[until][0]
                until += 1
        run = old[taken:until]
        if any(left[1] != right[0] * right[1] for left, right in itertools.pairwise(run)):
            return None
        result[end - 1] = run[-1][1]
        for inner in range(end - 1, axis, -1):
            result[inner - 1] = result[inner] * new[inner]
        axis, taken = end, until
    for rest in range(axis, len(new)):
        result[rest] = result[axis - 1] if axis else 1
    return tuple(result)
