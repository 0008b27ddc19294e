"""``python -m qwenvl_mlx.verify``: the same prompt through MLX and PyTorch, compared stage by stage.

The reference is either a PyTorch checkpoint (``--against``), or what one gave before (``--golden``, written by
``--save`` on a machine that has PyTorch). Both sides get the same token ids and the same patches.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_mlx import cli
from qwenvl_mlx.errors import GenerationError, OutputError

if TYPE_CHECKING:
    import mlx.nn as nn
    import numpy as np
    from numpy.typing import NDArray

    from qwenvl_mlx.media import Prompt
    from qwenvl_mlx.models.base import Places, VisionLanguageModel
    from qwenvl_mlx.parity import Stages

# Largest difference, as a part of the stage's root mean square: tiny checkpoints of every generation stay below 1e-4
# in float32; half precision has 2^-11 and 2^-8, and layers add up.
LIMITS = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}
# Mean Kullback-Leibler divergence of the next token's distribution, in nats.
DIVERGENCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 2e-2}
QUANTISED_DIVERGENCE = {8: 0.05, 0: 0.5}  # from so many bits on


@dataclass(frozen=True)
class Row:
    """One line of the table. ``limit`` None: shown, not judged."""

    stage: str
    largest: float
    mean: float
    scale: float
    limit: float | None

    @property
    def failed(self) -> bool:
        # written so that a nan fails
        return self.limit is not None and not self.largest <= self.limit


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.golden and (args.image or args.prompt or args.save):
        parser.error("--golden brings its own prompt and pictures: leave out --prompt, --image and --save")
    cli.set_up_logging(args)
    return cli.run(lambda: _work(args))


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("verify", "Compare a model's numbers with PyTorch's, stage by stage.")
    cli.add_model_argument(parser)
    reference = parser.add_argument_group("reference").add_mutually_exclusive_group(required=True)
    reference.add_argument("--against", metavar="TORCH", help="folder of the PyTorch checkpoint; needs torch")
    reference.add_argument(
        "--golden", type=Path, metavar="FILE.npz", help="what --save wrote; needs no torch"
    )
    parser.add_argument("--save", type=Path, metavar="FILE.npz", help="keep the reference's numbers")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python files of the checkpoint's folder: the original Qwen-VL brings its own PyTorch code",
    )
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="repeatable (default: a test picture)"
    )
    prompt.add_argument("--prompt", metavar="TEXT", help="the question")
    prompt.add_argument(
        "--max-tokens", type=cli.positive, default=16, metavar="N", help="tokens to decode (default: 16)"
    )
    return parser


def _work(args: argparse.Namespace) -> int:
    if args.save and (args.save.exists() or not args.save.absolute().parent.is_dir()):
        raise OutputError(f"{args.save} exists or its folder does not: give another --save")
    original = args.against is not None and _is_original(args)
    cli.use_device(args.device)
    from qwenvl_mlx import parity
    from qwenvl_mlx.media import media_kinds

    dtype = args.dtype or "float32"
    if args.golden:
        prompt, theirs = parity.read_golden(args.golden)
        ours = _ours(args, dtype, prompt, theirs.tokens)
    else:
        from qwenvl_mlx.parity_torch import run_hub_code, run_transformers

        ours = _ours(args, dtype, None, args.max_tokens)
        reference = run_hub_code if original else run_transformers
        theirs = reference(Path(args.against), ours.prompt, ours.places, ours.stages.tokens, dtype)
    if args.save:
        parity.write_golden(args.save, ours.prompt, theirs)
    rows = list(compare(ours, theirs, dtype))
    print(f"{args.model}: {len(ours.prompt)} tokens, {media_kinds(ours.prompt.media)}, {dtype}")
    print(table(rows))
    return int(any(row.failed for row in rows))


@dataclass(frozen=True, eq=False)
class Ours:
    """MLX's side. ``places``: which tokens each picture takes; ``vision`` and ``language``: bits where quantised."""

    prompt: Prompt
    stages: Stages
    places: list[Places]
    vision: int | None
    language: int | None

    @classmethod
    def of(cls, model: VisionLanguageModel, prompt: Prompt, follow: int | list[int]) -> Ours:
        """Run the prompt; see ``parity.run_mlx``."""
        from qwenvl_mlx.parity import run_mlx

        count = follow if isinstance(follow, int) else len(follow)
        if model.rope_key(len(prompt)) != model.rope_key(len(prompt) + count):
            raise GenerationError(
                "the answer crosses a length where positions change: use fewer --max-tokens"
            )
        places = model.media_places(prompt.input_ids, prompt.media)
        stages = run_mlx(model, prompt, follow)
        return cls(prompt, stages, places, bits(model.vision_tower), bits(model.language_model))


def _ours(args: argparse.Namespace, dtype: str, prompt: Prompt | None, follow: int | list[int]) -> Ours:
    """The model leaves memory with the end of this function: PyTorch's may need all of it."""
    from qwenvl_mlx.api import load, load_model

    if prompt is not None:
        return Ours.of(load_model(args.model, dtype=dtype), prompt, follow)
    model, processor = load(args.model, dtype=dtype)
    return Ours.of(model, processor([{"role": "user", "content": _content(args)}]), follow)


def _is_original(args: argparse.Namespace) -> bool:
    """Whether ``--against`` is the original Qwen-VL, which PyTorch runs by code that its folder brings."""
    from qwenvl_mlx import hub
    from qwenvl_mlx.config import read_json

    folders = (Path(args.against), hub.resolve(args.model))
    theirs, ours = (read_json(folder / "config.json").get("model_type") for folder in folders)
    if ours != theirs:
        raise GenerationError(f"--model is {ours} but --against is {theirs}: give the original of this model")
    original = theirs == "qwen"
    if original and not args.trust_remote_code:
        raise GenerationError(
            "the original Qwen-VL runs in PyTorch by the code in its folder: read that code, then pass "
            "--trust-remote-code, or compare with numbers kept elsewhere through --golden"
        )
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        raise GenerationError("--against needs PyTorch: pip install torch torchvision transformers")
    return original


def _content(args: argparse.Namespace) -> list[dict[str, Any]]:
    pictures = args.image or [_test_picture()]
    text = {"type": "text", "text": args.prompt or "Describe this picture in detail."}
    return [*({"type": "image", "image": picture} for picture in pictures), text]


def _test_picture() -> NDArray[np.uint8]:
    """Slopes, stripes and noise, ``[336, 448, 3]``."""
    import numpy as np

    y, x = np.mgrid[0:336, 0:448]
    noise = np.random.default_rng(0).integers(0, 64, x.shape)
    return np.stack([x * 255 // 448, (x // 16 + y // 16) % 2 * 192, y // 2 + noise], axis=-1).astype(np.uint8)


def bits(part: nn.Module) -> int | None:
    """The smallest number of bits of any quantised module; None for a plain part of a model."""
    modules = part.named_modules()  # type: ignore[no-untyped-call]
    found: list[int] = [module.bits for _, module in modules if hasattr(module, "bits")]
    return min(found, default=None)


def compare(ours: Ours, theirs: Stages, dtype: str) -> Iterator[Row]:
    """One row for the features of each picture, the embeddings, each layer, the logits, the tokens.

    Stages behind quantised weights are shown without a verdict: the distribution of answers is judged instead.
    """
    mine, reference = ours.stages, theirs
    vision, limit = (None if packed else LIMITS[dtype] for packed in (ours.vision, ours.language))
    for index, place in enumerate(ours.places):
        yield _row(f"features {index + 1}", mine.states[0][place], reference.states[0][place], vision)
    for index, (state, wanted) in enumerate(zip(mine.states, reference.states, strict=True)):
        yield _row(f"layer {index}" if index else "embeddings", state, wanted, limit)
    decoded = len(mine.tokens)
    for stage, rows in (
        ("logits, prompt", slice(None, -decoded)),
        ("logits, decoded", slice(-decoded, None)),
    ):
        yield _row(stage, mine.logits[rows], reference.logits[rows], limit)
    yield _divergence(mine, reference, dtype, ours.language or ours.vision)
    yield _tokens(mine, reference, limit)


def _row(stage: str, ours: NDArray[np.float32], theirs: NDArray[np.float32], limit: float | None) -> Row:
    if ours.shape != theirs.shape:
        raise GenerationError(f"{stage}: shapes {ours.shape} and {theirs.shape}: are these the same model?")
    apart = abs(ours - theirs)
    scale = float((theirs**2).mean() ** 0.5)
    return Row(
        stage, float(apart.max()), float(apart.mean()), scale, None if limit is None else limit * scale
    )


def _divergence(ours: Stages, theirs: Stages, dtype: str, quantised: int | None) -> Row:
    import numpy as np

    def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
        x = logits.astype(np.float64)
        x -= x.max(-1, keepdims=True)
        logs: NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
        return logs

    mine, reference = log_softmax(ours.logits), log_softmax(theirs.logits)
    each = (np.exp(reference) * (reference - mine)).sum(-1)
    limit = DIVERGENCE[dtype]
    if quantised:
        limit = next(most for least, most in QUANTISED_DIVERGENCE.items() if quantised >= least)
    return Row("divergence", float(each.mean()), float(each.mean()), 1.0, limit)


def _tokens(ours: Stages, theirs: Stages, limit: float | None) -> Row:
    """How many greedy tokens differ although the reference's two best are further apart than the tolerance."""
    import numpy as np

    count = len(ours.tokens) + 1  # the prompt's last row gives the first token
    mine, reference = ours.logits[-count:], theirs.logits[-count:]
    best = np.sort(reference, axis=-1)
    near = best[:, -1] - best[:, -2] <= 2 * (limit or 0) * float((reference**2).mean() ** 0.5)
    differ = (mine.argmax(-1) != reference.argmax(-1)) & ~near
    return Row(
        "greedy tokens", int(differ.sum()), float(differ.mean()), count, None if limit is None else 0.0
    )


def table(rows: Sequence[Row]) -> str:
    """Stage, largest and mean difference, the reference's size, what is allowed, verdict."""
    width = max(len(row.stage) for row in rows)
    lines = [f"{'stage':{width}}  {'max diff':>9}  {'mean diff':>9}  {'rms':>9}  {'allowed':>9}"]
    for row in rows:
        allowed = "-" if row.limit is None else f"{row.limit:.1e}"
        verdict = "FAILED" if row.failed else "" if row.limit is None else "ok"
        numbers = f"{row.largest:9.1e}  {row.mean:9.1e}  {row.scale:9.1e}  {allowed:>9}"
        lines.append(f"{row.stage:{width}}  {numbers}  {verdict}".rstrip())
    failed = sum(row.failed for row in rows)
    judged = sum(row.limit is not None for row in rows)
    lines.append(
        f"FAILED: {failed} of {judged} stages" if failed else f"parity holds: {judged} of {judged} stages"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
