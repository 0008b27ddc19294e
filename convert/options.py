"""What a conversion is asked for, checked before anything is read. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from qwenvl_mlx.config import one_of
from qwenvl_mlx.errors import ConfigError

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
RECIPES = ("uniform", "mixed", "mixed_6")
REPORTS = ("auto", "full", "weights")
# MLX's modes: (bits, group size) that they have, or None where both are free.
MODES: dict[str, tuple[int, int] | None] = {
    "affine": None,
    "mxfp4": (4, 32),
    "nvfp4": (4, 16),
    "mxfp8": (8, 32),
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """How one module is quantised, in the words of ``config.json``."""

    bits: int
    group_size: int
    mode: str = "affine"

    def as_dict(self) -> dict[str, int | str]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


@dataclass(frozen=True)
class ConvertOptions:
    """``quantise``: settings of ordinary modules, None to leave them as they are. ``vision_bits``: for the linear
    layers of the vision tower, None to leave them as they are. ``dtype``: of everything else, None as stored.
    ``report``: whether the behaviours of source and result are compared, see ``quality``. ``calibrate``: quantise
    with regard to the inputs that modules get, see ``calibrate``.
    """

    quantise: Settings | None = None
    recipe: str = "uniform"
    vision_bits: int | None = None
    dtype: str | None = None
    dequantise: bool = False
    report: str = "auto"
    calibrate: bool = False

    def as_dict(self) -> dict[str, object]:
        return {
            "quantisation": self.quantise.as_dict() if self.quantise else None,
            "recipe": self.recipe if self.quantise else None,
            "vision_bits": self.vision_bits,
            "dtype": self.dtype,
            "calibrated": self.calibrate,
            "dequantise": self.dequantise,
        }


def make_options(
    *,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    q_recipe: str = "uniform",
    q_vision: int | bool | None = None,
    q_report: str = "auto",
    q_calibrate: bool = False,
    dtype: str | None = None,
    dequantize: bool = False,
) -> ConvertOptions:
    """Options from the command line's values; ``ConfigError`` for those that contradict each other."""
    one_of(q_recipe, RECIPES, key="q_recipe", where="convert")
    one_of(q_report, REPORTS, key="q_report", where="convert")
    one_of(dtype, (None, *DTYPES), key="dtype", where="convert")
    if quantize and dequantize:
        raise ConfigError("quantising and dequantising exclude each other: choose -q or -d")
    if q_calibrate and not (quantize and q_mode == "affine"):
        raise ConfigError("calibration is for quantising in affine mode: add -q, leave --q-mode out")
    settings = _settings(q_bits, q_group_size, q_mode) if quantize else None
    return ConvertOptions(
        quantise=settings,
        recipe=q_recipe,
        vision_bits=_vision_bits(q_vision),
        dtype=dtype,
        dequantise=dequantize,
        report=q_report,
        calibrate=q_calibrate,
    )


def _settings(bits: int | None, group_size: int | None, mode: str) -> Settings:
    one_of(mode, MODES, key="q_mode", where="convert")
    one_of(bits, (None, *BITS), key="q_bits", where="convert")
    fixed = MODES[mode]
    if fixed is None:
        one_of(group_size, (None, *GROUP_SIZES), key="q_group_size", where="convert")
        return Settings(bits or 4, group_size or 64, mode)
    if (bits or fixed[0], group_size or fixed[1]) != fixed:
        raise ConfigError(
            f"mode {mode} has {fixed[0]} bits in groups of {fixed[1]}: leave bits and group size out"
        )
    return Settings(*fixed, mode)


def _vision_bits(value: int | bool | None) -> int | None:
    bits = 8 if value is True else value or None
    one_of(bits, (None, *BITS), key="q_vision", where="convert")
    return bits
