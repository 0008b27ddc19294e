"""What ``info`` says about models is counted, and what it says about the machine is asked of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenvl_mlx.info import FORMS, Size, machine, main, present, published
from qwenvl_mlx.models import model_class
from qwenvl_mlx.sizes import SIZES


@pytest.mark.parametrize(
    ("name", "billions"),
    # As published with the checkpoints.
    [("Qwen-VL-Chat", 9.66), ("Qwen2.5-VL-7B", 8.29), ("Qwen3-VL-235B-A22B", 235.7), ("Qwen3.5-27B", 27.4)],
)
def test_parameters_are_those_of_the_published_checkpoints(name: str, billions: float) -> None:
    size = Size.of(name, model_class(SIZES[name])(SIZES[name]))
    assert size.parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_memory_grows_with_context_and_shrinks_with_bits() -> None:
    config = SIZES["Qwen2.5-VL-7B"]
    size = Size.of("x", model_class(config)(config))
    assert size.token == 28 * 2 * 4 * 128 * 2  # layers, keys and values, heads, numbers, bytes
    assert size.nbytes(16, 0) == 2 * size.parameters
    assert size.nbytes(16, 1000) - size.nbytes(16, 0) == pytest.approx(1000 * size.token, abs=1)
    assert 0.28 < size.nbytes(4.5, 0) / size.nbytes(16, 0) < 0.4  # the vision tower stays as it is


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_readmes_say_what_is_counted(readme: str) -> None:
    text = (Path(__file__).parent.parent / readme).read_text(encoding="utf-8")
    for size in published():
        needs = [f"{size.nbytes(bits, 8192) / 1e9:.1f}" for bits in FORMS.values()]
        assert f"| {size.name} | {size.parameters / 1e9:.1f} B | {' | '.join(needs)} |" in text


def test_the_command_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--context", "4096"]) == 0
    out = capsys.readouterr().out
    for name in (*SIZES, "chip", "memory", "MLX", "Metal", "4096 tokens", "--model demo"):
        assert name in out


def test_cached_models_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenvl_mlx.hub.cached_models", lambda: ["Qwen/Qwen2.5-VL-7B-Instruct"])
    assert any("Qwen/Qwen2.5-VL-7B-Instruct" in line for line in present())


def test_machine_names_its_memory() -> None:
    assert any("GB" in line for line in machine())
