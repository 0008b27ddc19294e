"""What quantising cost: errors of the weights, and what changed in the model's answers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from qwenvl_mlx.checkpoint import load_model
from qwenvl_mlx.convert.answers import Known, know, known_answers
from qwenvl_mlx.convert.probes import probes
from qwenvl_mlx.convert.transform import Plan, empty_result
from qwenvl_mlx.engine.kv import kv_cost
from qwenvl_mlx.errors import QwenVLError
from qwenvl_mlx.media import Prompt
from qwenvl_mlx.processor.load import load_processor

SMALL_SOURCE = (
    200_000_000  # bytes that "auto" loads: beyond, a conversion would need more memory than streaming does
)
MEMORY_SHARE = 0.7  # of the machine's, that "full" may take
LAST = 48  # positions of each prompt that are compared: the text after its picture
CONTEXT = 4096  # tokens that the expected memory allows for


@dataclass(frozen=True)
class Behaviour:
    """Result against source over ``positions`` next-token distributions: mean KL divergence (nats), same best token.

    ``before``, ``after``: how source and result know the answers that come with the checkpoint, if any do.
    """

    kl_divergence: float
    top1_agreement: float
    positions: int
    prompts: int
    before: Known | None = None
    after: Known | None = None


@dataclass(frozen=True)
class Quality:
    """The report. ``behaviour``: None where it was not measured, and ``note`` tells why."""

    errors: Mapping[str, float]
    behaviour: Behaviour | None
    note: str
    weight_bytes: int
    bits_per_weight: float
    expected_memory: int

    @property
    def mean_error(self) -> float:
        return sum(self.errors.values()) / len(self.errors) if self.errors else 0.0

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """Modules with the largest relative errors."""
        return sorted(self.errors.items(), key=lambda item: (-item[1], item[0]))[:count]

    def as_dict(self, plan: Plan) -> dict[str, Any]:
        """The content of ``quality.json``."""
        modules = {
            path: plan.recipe[path].as_dict() | {"relative_error": round(error, 6)}
            for path, error in sorted(self.errors.items())
        }
        return {
            "behaviour": asdict(self.behaviour) if self.behaviour else None,
            "note": self.note,
            "weight_bytes": self.weight_bytes,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "expected_memory_bytes": self.expected_memory,
            "mean_relative_error": round(self.mean_error, 6),
            "modules": modules,
        }

    def rows(self) -> list[tuple[str, str]]:
        """The figures to show: what, how much."""
        rows = []
        if self.behaviour:
            rows.append(("KL divergence from the source", f"{self.behaviour.kl_divergence:.4f} nats"))
            rows.append(("same best token as the source", f"{self.behaviour.top1_agreement:.1%}"))
            rows += _known_rows(self.behaviour.before, self.behaviour.after)
        if self.errors:
            rows.append(("mean relative error of quantised weights", f"{self.mean_error:.2%}"))
        rows.append(("size of the weights", _bytes(self.weight_bytes)))
        rows.append(("bits per weight", f"{self.bits_per_weight:.2f}"))
        rows.append((f"memory with {CONTEXT} tokens of context", _bytes(self.expected_memory)))
        return rows


def measure(plan: Plan, source: Path, result: Path, errors: Mapping[str, float]) -> Quality:
    """Put the report together. Which models are loaded: "auto" small ones, "full" all that fit memory."""
    weight_bytes = sum(outline.nbytes for outline in plan.outlines.values())
    parameters = dict(_sizes(plan))
    behaviour, note = _behaviour(plan, source, result)
    cost = kv_cost(empty_result(plan), None)
    return Quality(
        errors=errors,
        behaviour=behaviour,
        note=note,
        weight_bytes=weight_bytes,
        bits_per_weight=8 * weight_bytes / sum(parameters.values()),
        expected_memory=int(weight_bytes + cost.token * CONTEXT + cost.fixed),
    )


def _sizes(plan: Plan) -> Mapping[str, int]:
    """Numbers of weights, quantised ones counted as what they stand for."""
    sizes = {}
    for name, outline in plan.outlines.items():
        path, _, kind = name.rpartition(".")
        if path in plan.recipe:
            if kind == "weight":
                sizes[name] = prod(outline.shape[:-1]) * plan.modules[path]
        else:
            sizes[name] = prod(outline.shape)
    return sizes


def _behaviour(plan: Plan, source: Path, result: Path) -> tuple[Behaviour | None, str]:
    report = plan.options.report
    rounded = plan.options.dtype or plan.options.dequantise or plan.config.get("quantization_config")
    if not (plan.recipe or rounded):
        return None, ""  # every value is as it was
    if report == "weights":
        return None, "behaviour was not asked for"
    if report == "auto" and _source_bytes(plan) > SMALL_SOURCE:
        return None, "behaviour was not measured, which needs the source in memory: --q-report full"
    if not fits_memory(plan):
        return None, "behaviour was not measured: the source does not fit into this machine's memory"
    try:
        processor = load_processor(source, plan.config)
        prompts, asked = list(probes(processor)), known_answers(source, processor)
    except QwenVLError as error:
        return None, f"behaviour was not measured: {error}"
    behaviour = compare(source, result, prompts)
    if asked:
        before, after = (know(folder, asked, working_dtype()) for folder in (source, result))
        behaviour = replace(behaviour, before=before, after=after)
    return behaviour, ""


def _known_rows(before: Known | None, after: Known | None) -> list[tuple[str, str]]:
    if not (before and after):
        return []
    return [
        ("log-likelihood of a true word", f"{after.likelihood:.4f} nats (source {before.likelihood:.4f})"),
        ("true words that it says itself", f"{after.accuracy:.1%} (source {before.accuracy:.1%})"),
    ]


def compare(source: Path, result: Path, prompts: list[Prompt]) -> Behaviour:
    """Run the same prompts through both models, one after the other in memory."""
    before = _distributions(source, prompts)
    after = _distributions(result, prompts)
    divergence, agreed, positions = 0.0, 0, 0
    for one, two in zip(before, after, strict=True):
        divergence += cast(float, mx.sum(mx.exp(one) * (one - two)).item())
        agreed += cast(int, mx.sum(mx.argmax(one, axis=-1) == mx.argmax(two, axis=-1)).item())
        positions += one.shape[0]
    divergence = max(divergence, 0.0)  # sums of float32 may end just below
    return Behaviour(round(divergence / positions, 6), round(agreed / positions, 6), positions, len(prompts))


def _distributions(folder: Path, prompts: list[Prompt]) -> list[mx.array]:
    """Logarithms of next-token probabilities ``[positions, vocab]``, float32, for each prompt."""
    model = load_model(folder, working_dtype())
    result = []
    for prompt in prompts:
        logits = model.logits(prompt)[0, -LAST:].astype(mx.float32)
        result.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(result[-1])
    return result


def working_dtype() -> str | None:
    """The type to compute in: as stored, but on the CPU, where half precision takes several times as long."""
    return "float32" if mx.default_device() == mx.cpu else None


def fits_memory(plan: Plan) -> bool:
    """Whether the source can be held by this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _source_bytes(plan) < MEMORY_SHARE * memory


def _source_bytes(plan: Plan) -> int:
    return sum(path.stat().st_size for path in plan.source.files.paths)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
