"""``python -m qwenvl_mlx.info``: this machine, which models fit it, and which are already here."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from qwenvl_mlx import __version__, cli

if TYPE_CHECKING:
    from qwenvl_mlx.models.base import VisionLanguageModel

GROUP = 64  # the usual one: a scale and a bias of two bytes each for so many weights
FORMS = {"bfloat16": 16.0, "8 bit": 8 + 32 / GROUP, "4 bit": 4 + 32 / GROUP}


@dataclass(frozen=True)
class Size:
    """What one model takes. ``plain``: parameters that stay in bfloat16 when the others are quantised."""

    name: str
    parameters: int
    plain: int
    token: float
    fixed: int

    @classmethod
    def of(cls, name: str, model: VisionLanguageModel) -> Size:
        """Counted on the model itself, none of whose arrays is ever computed."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        from qwenvl_mlx.engine.kv import kv_cost

        model.set_dtype(mx.bfloat16)
        arrays = dict(tree_flatten(model.parameters()))  # type: ignore[no-untyped-call]
        plain = sum(
            array.size
            for path, array in arrays.items()
            if not path.startswith("language_model") or array.ndim < 2 or array.shape[-1] % GROUP
        )
        cost = kv_cost(model, None)
        return cls(name, sum(array.size for array in arrays.values()), plain, cost.token, cost.fixed)

    def nbytes(self, bits: float, context: int) -> int:
        """Weights and the state of one conversation."""
        weights = (self.plain * 16 + (self.parameters - self.plain) * bits) / 8
        return int(weights + self.token * context + self.fixed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.make_parser("info", "Show this machine, which models fit its memory, and which are here.")
    parser.add_argument(
        "--context",
        type=cli.positive,
        default=8192,
        metavar="N",
        help="tokens of one conversation, with its pictures (default: 8192)",
    )
    cli.add_device_argument(parser)
    args = parser.parse_args(argv)
    cli.set_up_logging(args)
    return cli.run(lambda: _work(args))


def _work(args: argparse.Namespace) -> None:
    cli.use_device(args.device)
    print("\n".join([*machine(), "", *fitting(args.context), "", *present()]))


def machine() -> list[str]:
    """Chip, memory, software."""
    import mlx.core as mx

    from qwenvl_mlx.engine.memory import total_memory, working_set

    info = mx.device_info()
    metal = "yes" if mx.metal.is_available() else "no: models run on the CPU, slowly"
    return [
        f"chip          {info.get('device_name', platform.processor())} ({platform.machine()})",
        f"memory        {_gb(total_memory())}, for models {_gb(working_set())}",
        f"Metal         {metal}",
        f"software      qwenvl-mlx {__version__}, MLX {version('mlx')}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
    ]


def fitting(context: int) -> list[str]:
    """A table of all known sizes: weights and one conversation, and whether they fit."""
    from qwenvl_mlx.engine.memory import working_set

    room = working_set()
    lines = [
        f"Memory of the weights and {context} tokens of conversation (+ fits, - does not)",
        f"{'':20}{'parameters':>12}" + "".join(f"{form:>14}" for form in FORMS),
    ]
    for size in published():
        needs = [size.nbytes(bits, context) for bits in FORMS.values()]
        cells = [f"{_gb(need)} {'+' if need <= room else '-'}" for need in needs]
        parameters = f"{size.parameters / 1e9:.1f} B"
        lines.append(f"{size.name:20}{parameters:>12}" + "".join(f"{cell:>14}" for cell in cells))
    return lines


def published() -> Iterator[Size]:
    """All known sizes."""
    from qwenvl_mlx.models import model_class
    from qwenvl_mlx.sizes import SIZES

    for name, config in SIZES.items():
        yield Size.of(name, model_class(config)(config))


def present() -> list[str]:
    """Models that need no download."""
    from qwenvl_mlx.hub import cached_models

    cached = [f"  {name}" for name in cached_models()]
    return [
        "In the Hugging Face cache:" if cached else "In the Hugging Face cache: no Qwen-VL model",
        *cached,
        'To try it out without a download: python -m qwenvl_mlx.generate --model demo --prompt "Hello"',
    ]


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


if __name__ == "__main__":
    sys.exit(main())
