"""``python -m qwenvl_mlx.convert``: any checkpoint -> an MLX folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwenvl_mlx import cli
from qwenvl_mlx.convert.options import BITS, DTYPES, GROUP_SIZES, MODES, RECIPES, REPORTS

if TYPE_CHECKING:
    from qwenvl_mlx.convert.quality import Quality


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, convert, return the exit code."""
    args = parser().parse_args(argv)
    cli.set_up_logging(args)
    return cli.run(lambda: _convert(args))


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = cli.make_parser(
        "convert", "Convert a checkpoint (PyTorch, GPTQ, AWQ, FP8 or MLX) into an MLX folder."
    )
    add = parser.add_argument
    add(
        "--hf-path",
        "--model",
        required=True,
        metavar="M",
        help="folder, Hugging Face name, or modelscope:NAME",
    )
    add("--mlx-path", default="mlx_model", metavar="OUT", help="folder to make (default: mlx_model)")
    add("--revision", metavar="R", help="branch, tag or commit on the hub")
    add("--dtype", choices=DTYPES, help="type of what is not quantised (default: as stored)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("-q", "--quantize", action="store_true", help="quantise the language model")
    form.add_argument(
        "-d", "--dequantize", action="store_true", help="turn quantised weights into floating point"
    )
    add("--q-bits", type=int, choices=BITS, help="bits of a weight (default: 4)")
    add("--q-group-size", type=int, choices=GROUP_SIZES, help="weights that share a scale (default: 64)")
    add("--q-mode", choices=MODES, default="affine", help="form of quantised weights (default: affine)")
    add(
        "--q-recipe",
        choices=RECIPES,
        default="uniform",
        help="mixed, mixed_6: 8 or 6 bits for first and last layers, down projections and the output layer",
    )
    add(
        "--q-vision",
        type=int,
        choices=BITS,
        nargs="?",
        const=8,
        metavar="BITS",
        help="quantise the vision tower too (default: 8 bits)",
    )
    add(
        "--q-calibrate",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE.json",
        help="quantise by GPTQ on built-in texts and pictures, or on a list of texts and conversations; "
        "needs the source in memory",
    )
    add(
        "--q-report",
        choices=REPORTS,
        default="auto",
        help="full: load source and result and compare them; auto: small ones (default); weights: never",
    )
    add("--upload-repo", metavar="OWNER/NAME", help="upload the result to this Hugging Face repository")
    return parser


def _convert(args: argparse.Namespace) -> None:
    from qwenvl_mlx.convert.run import convert

    result = convert(
        args.hf_path,
        args.mlx_path,
        quantize=args.quantize,
        q_bits=args.q_bits,
        q_group_size=args.q_group_size,
        q_mode=args.q_mode,
        q_recipe=args.q_recipe,
        q_vision=args.q_vision,
        q_report=args.q_report,
        q_calibrate=args.q_calibrate,
        dtype=args.dtype,
        dequantize=args.dequantize,
        revision=args.revision,
        upload_repo=args.upload_repo,
    )
    print(result.folder)
    print_quality(result.quality)


def print_quality(quality: Quality) -> None:
    """The report in a few lines; all of it is in ``quality.json``."""
    for what, value in quality.rows():
        print(f"  {what}: {value}")
    if quality.errors:
        worst = ", ".join(f"{path} {error:.2%}" for path, error in quality.worst(3))
        print(f"  largest relative errors: {worst}")
    if quality.note:
        print(f"  ({quality.note})")


if __name__ == "__main__":
    sys.exit(main())
