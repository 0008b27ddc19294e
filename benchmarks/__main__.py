"""Time qwenvl-mlx on this machine, next to what else is installed.

python -m benchmarks --synthetic qwen2.5-vl-250m           # random weights of that shape, nothing to download
python -m benchmarks --model path/to/checkpoint --dtype bfloat16
python -m benchmarks roofline --synthetic qwen2.5-vl-3b    # how near to what the device allows
python -m benchmarks growth --synthetic qwen3-vl-250m      # over patches, prompt length and batch
python -m benchmarks counts                                # kernels and bytes, no Mac needed
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="?", default="compare", choices=("compare", "roofline", "growth", "counts")
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="FOLDER", help="a checkpoint on disk")
    source.add_argument(
        "--synthetic", metavar="SHAPE", default="qwen2.5-vl-250m", help="random weights of this shape"
    )
    parser.add_argument("--programs", nargs="+", default=["qwenvl-mlx", "torch", "mlx-vlm"], metavar="P")
    parser.add_argument(
        "--peer-python", metavar="PYTHON", help="interpreter of an environment that has mlx-vlm"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="measured rounds (default %(default)s)"
    )
    parser.add_argument(
        "--cases", nargs="+", metavar="TEXT", help="only cases whose name contains one of these"
    )
    parser.add_argument("--json", metavar="FILE", help="write the whole report there")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the medians (needs the bench extra)")
    return parser


def _run(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str]:
    from benchmarks import compare, growth, roofline
    from benchmarks.cases import CASES

    if args.what == "roofline":
        return roofline.measure(folder, dtype=args.dtype)
    if args.what == "growth":
        return growth.measure(folder, dtype=args.dtype)
    cases = [case for case in CASES if not args.cases or any(part in case.name for part in args.cases)]
    programs = compare.available(args.programs, args.peer_python)
    report = compare.compare(
        folder,
        programs=programs,
        dtype=args.dtype,
        rounds=args.rounds,
        cases=cases,
        peer_python=args.peer_python,
    )
    return report, compare.table(report)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.what == "counts":
        from benchmarks import launches

        print(launches.table(launches.measure()))
        return 0
    from benchmarks.synthetic import checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        if args.model:
            folder = Path(args.model)
        else:
            print(f"writing random weights for {args.synthetic}", file=sys.stderr)
            folder = checkpoint(args.synthetic, Path(scratch), for_torch="torch" in args.programs)
        report, text = _run(args, folder)
    print(", ".join(f"{key} {value}" for key, value in report["device"].items()))
    print(text)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    if args.plot:
        from benchmarks.plot import draw

        draw(report, Path(args.plot))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
