"""The one command of the benchmarks runs, and says what it measured, where and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.compare import Result, table
from benchmarks.growth import exponent
from benchmarks.launches import narrow
from benchmarks.synthetic import shape, write_mlx
from qwenvl_mlx.sizes import SIZES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers and two blocks of Qwen2.5-VL, very narrow."""
    config = narrow(SIZES["Qwen2.5-VL-7B"])
    config["num_hidden_layers"] = config["vision_config"]["depth"] = 2
    config["vision_config"]["fullatt_block_indexes"] = [1]
    place = tmp_path_factory.mktemp("weights")
    write_mlx(config, place)
    return place


def test_a_comparison_writes_its_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--programs", "qwenvl-mlx", "--rounds", "2", "--cases", "448", "--clock", "cpu"]
    assert main(["--model", str(folder), "--output", str(tmp_path), *options]) == 0
    report = json.loads((tmp_path / "report.json").read_text())["compare"]
    assert report["clock"] == "cpu"
    assert report["device"].keys() >= {"device", "chip", "os", "mlx"}
    (result,) = report["results"]
    assert result["case"] == "picture 448x448"
    assert result["vision_bytes"] > 32 * 32 * 160 * 4  # at least the patches' rows
    for part in ("vision", "prefill", "first token", "decode"):
        assert len(result["samples"][part]) == 2
        assert min(result["samples"][part]) > 0
    assert "| picture 448x448 | qwenvl-mlx |" in (tmp_path / "report.md").read_text()
    assert "picture 448x448" in capsys.readouterr().out


def test_ratios_are_of_runs_in_the_same_round() -> None:
    ours = Result(
        "qwenvl-mlx", "a", {part: [1.0, 4.0, 6.0] for part in ("vision", "prefill", "first token", "decode")}
    )
    theirs = Result("torch", "a", {part: [2.0, 4.0, 3.0] for part in ours.samples}, peak=5 * 10**9)
    report = {"loads": {}, "results": [vars(ours), vars(theirs)]}
    row = table(report).splitlines()[-1]
    assert "| 3.000 (ours ×1.00) |" in row  # median of 0.5, 1 and 2
    assert "| 5.00 |" in row


def test_exponents_are_those_of_power_laws() -> None:
    sizes = [1, 2, 4, 8]
    assert exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)


def test_an_unknown_shape_is_told() -> None:
    with pytest.raises(SystemExit, match=r"qwen2\.5-vl-3b"):
        shape("qwen9-vl")
