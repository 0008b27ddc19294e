"""Time qwenvl-mlx on this machine, next to what else is installed.

python -m benchmarks                                       # against PyTorch, mlx-vlm and mlx-lm, on random weights
python -m benchmarks --model path/to/checkpoint --dtype bfloat16
python -m benchmarks --synthetic qwen2.5-vl-7b --bits 4    # true shape, nothing to download
python -m benchmarks roofline --synthetic qwen2.5-vl-3b    # how near to what the device allows
python -m benchmarks growth --synthetic qwen3-vl-250m      # over patches, prompt length and batch
python -m benchmarks startup                               # command to first token, import and load
python -m benchmarks preprocess                            # a photo of 12 megapixels to patches
python -m benchmarks counts                                # kernels and bytes, no Mac needed
python -m benchmarks host                                  # what the host pays for a decoded token
python -m benchmarks all --output results                  # everything, as results/report.md, .json and .png
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import blas

ON_WEIGHTS = ("compare", "roofline", "growth")
OTHERS = ("startup", "preprocess", "counts", "host")

Measured = tuple[dict[str, Any], str]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="compare", choices=(*ON_WEIGHTS, *OTHERS, "all"))
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="FOLDER", help="a checkpoint on disk")
    source.add_argument(
        "--synthetic", metavar="SHAPE", default="qwen2.5-vl-250m", help="random weights of this shape"
    )
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantise first; PyTorch is left out")
    names = ["qwenvl-mlx", "torch", "mlx-vlm", "mlx-lm"]
    parser.add_argument("--programs", nargs="+", default=names, choices=names, metavar="P")
    parser.add_argument(
        "--peer-python", metavar="PYTHON", help="interpreter of an environment that has mlx-vlm"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--clock",
        default="wall",
        choices=("wall", "cpu"),
        help="cpu: processor seconds of all threads, on a machine that others use too",
    )
    parser.add_argument(
        "--cores",
        type=int,
        default=blas.all_cores(),
        metavar="N",
        help="processor cores of all that is measured, on Linux (default: all, here %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="measured rounds (default %(default)s)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=20,
        metavar="S",
        help="growth: a series ends with the first point of more seconds (default %(default)s)",
    )
    parser.add_argument(
        "--cases", nargs="+", metavar="TEXT", help="only cases whose name contains one of these"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="write report.json, report.md and report.png there"
    )
    return parser


def _measure(what: str, args: argparse.Namespace, folder: Path) -> Measured:
    """The report and its Markdown table."""
    from benchmarks import compare, growth, host, launches, preprocess, roofline, startup
    from benchmarks.cases import CASES
    from benchmarks.device import describe

    cases = [case for case in CASES if not args.cases or any(part in case.name for part in args.cases)]
    if what == "counts":
        counts = launches.measure()
        return {"device": describe(), "counts": counts}, launches.table(counts)
    if what == "host":
        return host.measure()
    if what == "preprocess":
        return preprocess.measure()
    if what == "startup":
        model = Path(args.model or startup.DEMO)
        return startup.measure(model, peer_python=args.peer_python, rounds=args.rounds)
    if what == "roofline":
        return roofline.measure(folder, dtype=args.dtype, rounds=args.rounds, cases=cases)
    if what == "growth":
        return growth.measure(folder, dtype=args.dtype, patience=args.patience)
    report = compare.compare(
        folder,
        programs=compare.available(_programs(args), args.peer_python, folder),
        dtype=args.dtype,
        clock=args.clock,
        cores=args.cores,
        rounds=args.rounds,
        cases=cases,
        peer_python=args.peer_python,
    )
    return report, compare.table(report)


def _programs(args: argparse.Namespace) -> list[str]:
    return [name for name in args.programs if not (args.bits and name == "torch")]


def _weights(args: argparse.Namespace, scratch: Path) -> Path:
    """The folder to measure: the user's or a random one, quantised if that was asked for."""
    from benchmarks.synthetic import checkpoint
    from qwenvl_mlx.convert.__main__ import main as convert

    if args.model:
        folder = Path(args.model)
    else:
        print(f"writing random weights for {args.synthetic}", file=sys.stderr)
        folder = checkpoint(args.synthetic, scratch, for_torch="torch" in _programs(args))
    if args.bits:
        quantised = scratch / f"{folder.name}-{args.bits}bit"
        if convert(
            ["--hf-path", str(folder), "--mlx-path", str(quantised), "-q", "--q-bits", str(args.bits)]
        ):
            raise SystemExit("the weights could not be quantised: the message is above")
        folder = quantised
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    blas.load()
    with blas.only(args.cores):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    wanted = (*ON_WEIGHTS, *OTHERS) if args.what == "all" else (args.what,)
    reports, texts = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        folder = _weights(args, Path(scratch)) if set(wanted) & set(ON_WEIGHTS) else Path()
        for what in wanted:
            reports[what], text = _measure(what, args, folder)
            device = ", ".join(f"{key} {value}" for key, value in reports[what]["device"].items())
            texts.append(f"## {what}\n\n{device}\n\n{text}\n")
            print(texts[-1], flush=True)
    if args.output:
        _write(Path(args.output), reports, "\n".join(texts))
    return 0


def _write(folder: Path, reports: dict[str, dict[str, Any]], text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(reports, indent=1))
    (folder / "report.md").write_text(text)
    if "compare" in reports:
        from benchmarks.plot import draw

        try:
            draw(reports["compare"], folder / "report.png")
        except ImportError as error:
            print(f'no plot ({error}): pip install "qwenvl-mlx[bench]"', file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
