"""The one command of the benchmarks runs, and says what it measured, where and how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten

from benchmarks import blas, engine, growth
from benchmarks.__main__ import main
from benchmarks.cases import Case, inputs
from benchmarks.compare import PARTS, Result, available, table
from benchmarks.counts import metal_view
from benchmarks.growth import exponent
from benchmarks.launches import built, narrow, prefill
from benchmarks.plot import draw
from benchmarks.programs import PROGRAMS
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
    for part in PARTS:
        assert len(result["samples"][part]) == 2
        assert min(result["samples"][part]) > 0
    assert "| picture 448x448 | qwenvl-mlx |" in (tmp_path / "report.md").read_text()
    assert "picture 448x448" in capsys.readouterr().out


HUB_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class Config(PretrainedConfig):
    model_type = "qwen"


class Visual(torch.nn.Module):
    def forward(self, pixels):
        return pixels.mean((1, 2, 3)).reshape(1, 1, 1).expand(1, 256, 1)

    def encode(self, paths):
        raise FileNotFoundError(paths)


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.transformer = torch.nn.Module()
        self.transformer.visual = Visual()
        self.rows = torch.nn.Parameter(torch.ones(1))
        self.post_init()

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        if past_key_values is None:
            seen = self.transformer.visual.encode(["x"]) if (input_ids > 630).any() else torch.zeros(1)
        else:
            seen = past_key_values
        logits = torch.nn.functional.one_hot(input_ids, 640).float() + seen.mean()
        return CausalLMOutputWithPast(logits=logits, past_key_values=seen)
"""


def test_the_originals_own_code_is_run_where_its_folder_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in with the calls that the hub's code has; without such code PyTorch is left out."""
    pytest.importorskip("transformers")
    from safetensors.numpy import save_file

    config = narrow(SIZES["Qwen-VL-Chat"])
    names = {"AutoConfig": "modeling_qwen.Config", "AutoModelForCausalLM": "modeling_qwen.Model"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    assert available(["qwenvl-mlx", "torch", "mlx-lm"], None, tmp_path) == ["qwenvl-mlx"]
    assert "brings no PyTorch code" in capsys.readouterr().err
    (tmp_path / "modeling_qwen.py").write_text(HUB_CODE)
    save_file({"rows": np.ones(1, np.float32)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert available(["qwenvl-mlx", "torch"], None, tmp_path) == ["qwenvl-mlx", "torch"]
    program = PROGRAMS["torch"](str(tmp_path), "float32", time.perf_counter)
    for case in (Case("text", None, 16, 2), Case("picture", (448, 448), 16, 2)):
        given = inputs(case, config)
        timings, logits = program.run(case, given)
        seen = 0 if given.rows is None else given.rows.mean()
        assert logits[given.ids[-1]] == pytest.approx(1 + seen, abs=1e-5)
        assert (timings["preprocess"] > 0.001) == (case.picture is not None)


def test_the_original_is_measured(tmp_path: Path) -> None:
    config = narrow(SIZES["Qwen-VL-Chat"])
    config["num_hidden_layers"] = config["visual"]["layers"] = 2
    write_mlx(config, tmp_path)
    options = ["--rounds", "1", "--cases", "448", "--output", str(tmp_path / "out")]
    assert main(["--model", str(tmp_path), *options]) == 0
    (result,) = json.loads((tmp_path / "out/report.json").read_text())["compare"]["results"]
    assert result["program"] == "qwenvl-mlx"
    assert min(result["samples"]["vision"]) > 0


def test_ratios_are_of_runs_in_the_same_round() -> None:
    ours = Result("qwenvl-mlx", "a", {part: [1.0, 4.0, 6.0] for part in PARTS})
    theirs = Result("torch", "a", {part: [2.0, 4.0, 3.0] for part in ours.samples}, peak=5 * 10**9)
    report = {"loads": {}, "results": [vars(ours), vars(theirs)]}
    row = table(report).splitlines()[-1]
    assert "| 3.000 (ours ×1.00) |" in row  # median of 0.5, 1 and 2
    assert "| 5.00 |" in row


def test_shares_of_what_the_device_allows(folder: Path, tmp_path: Path) -> None:
    options = ["--model", str(folder), "--cases", "448", "--rounds", "1", "--output", str(tmp_path)]
    assert main(["roofline", *options]) == 0
    report = json.loads((tmp_path / "report.json").read_text())["roofline"]
    (row,) = report["results"]
    for part, what, limit in (("vision", "flops", "matmul"), ("prefill", "flops", "matmul")):
        assert row[f"{part} of peak"] == pytest.approx(row[f"{part} {what}"] / row[part] / report[limit])
    assert 0 < row["decode of bandwidth"] < 2
    assert "| picture 448x448 |" in (tmp_path / "report.md").read_text()


def sizes(report: dict[str, Any]) -> list[list[int]]:
    return [[point["size"] for point in points] for points in report["series"].values()]


def test_series_grow_until_patience_ends(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "PICTURES", ((112, 112), (224, 224)))
    for name in ("PROMPTS", "BATCHES", "SLICES"):
        monkeypatch.setattr(growth, name, (2, 4, 8))
    options = ["--model", str(folder), "--output", str(tmp_path)]
    assert main(["growth", *options]) == 0
    report = json.loads((tmp_path / "report.json").read_text())["growth"]
    assert sizes(report) == [[64, 256], [2, 4, 8], [2, 4, 8], [2, 4, 8]]
    assert all(point["held"] > 1 for point in report["series"]["vision, patches"])
    assert main(["growth", *options, "--patience", "0"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())["growth"]
    assert sizes(report) == [[64], [2], [2], [2]]


def test_exponents_are_those_of_power_laws() -> None:
    sizes = [1, 2, 4, 8]
    assert exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert exponent([1], [2]) is None


def test_a_bar_stands_at_its_case_for_each_program(tmp_path: Path) -> None:
    """Programs that do not run every case too: their bars stand where those cases are."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pairs = {("qwenvl-mlx", "a"): 1.0, ("qwenvl-mlx", "b"): 2.0, ("mlx-lm", "b"): 3.0}
    results = [Result(*pair, {part: [time] for part in PARTS}) for pair, time in pairs.items()]
    draw({"device": {"chip": "M2"}, "results": [vars(result) for result in results]}, tmp_path / "bars.png")
    figure = pyplot.gcf()
    assert [panel.get_title() for panel in figure.axes] == [f"{part} (s)" for part in PARTS]
    for panel in figure.axes:
        assert [label.get_text() for label in panel.get_xticklabels()] == ["a", "b"]
        bars = {bar.get_height(): bar.get_x() + bar.get_width() / 2 for bar in panel.patches}
        assert bars.keys() == {1.0, 2.0, 3.0}
        assert bars[2.0] - bars[1.0] == pytest.approx(1)
        assert bars[3.0] - bars[2.0] == pytest.approx(1 / 3)  # beside the other program's, not over it
    assert (tmp_path / "bars.png").stat().st_size > 1000
    pyplot.close(figure)


def test_operations_of_a_graph_are_counted() -> None:
    """Two for each weight and token; attention to all keys, once with the keys and once with the values.

    Of the last layer the last token needs queries, output and feed-forward layer, all tokens keys and values.
    """
    config = narrow(SIZES["Qwen2.5-VL-7B"])
    config["num_hidden_layers"] = 2
    with metal_view():
        model, _ = built(config, bits=None)
        found = prefill(model, model.make_cache(), [1] * 24).flops
        head, layer = model.language_model.lm_head, model.language_model.model.layers[0]
        matrices = {name: array.size for name, array in tree_flatten(layer.parameters()) if array.ndim == 2}
    heads = config["num_attention_heads"] * config["head_dim"]
    first, projections = sum(matrices.values()), matrices["self_attn.qkv_proj.weight"]
    last = 24 * projections + (first - projections)
    assert found == 2 * (24 * first + last + head.weight.size) + 4 * (24 + 1) * 24 * heads


def test_words_are_no_placeholders_wherever_those_stand() -> None:
    """The demo's stand first in its vocabulary."""
    config = narrow(SIZES["Qwen2.5-VL-7B"])
    config.update(image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6)
    ids = inputs(Case("", None, 2000, 1), config).ids
    assert not set(ids.tolist()) & {3, 4, 5}
    assert 0 <= ids.min() < ids.max() < config["vocab_size"]


def test_an_unknown_shape_is_told() -> None:
    with pytest.raises(SystemExit, match=r"qwen2\.5-vl-3b"):
        shape("qwen9-vl")


def test_every_program_has_the_same_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch and BLIS by threads of their own; ours deals its work out, so that its BLIS has one."""
    monkeypatch.setattr(blas, "BLIS", Path(__file__))
    assert "BLIS_NUM_THREADS" not in blas.environment("torch", 2)
    assert blas.environment("torch", 2)["OMP_NUM_THREADS"] == "2"
    assert blas.environment("mlx-vlm", 2)["BLIS_NUM_THREADS"] == "2"
    assert blas.environment("qwenvl-mlx", 2)["BLIS_NUM_THREADS"] == "1"
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("macOS can't hold a process to some cores")
    before = os.sched_getaffinity(0)
    count = [sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"]
    with blas.only(1):
        assert subprocess.run(count, check=True, capture_output=True, text=True).stdout.strip() == "1"
    assert os.sched_getaffinity(0) == before
    assert blas.all_cores() == len(before)


def test_the_engine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that needs no large model; ``gap`` ends, and has seen slices."""
    monkeypatch.setattr(engine, "ANSWER", 8)
    config = shape("qwen2.5-vl-250m")
    vision = {**config["vision_config"], **engine.SMALL_VISION, "fullatt_block_indexes": [3]}
    bench = engine.Bench({**config, **engine.SMALL, "vision_config": vision})
    second, batch, gaps = bench.second(), bench.batch(), bench.gap()
    assert second["cached_tokens"] > 1700
    assert batch["identical"]
    assert all(0.5 < gap["gap_s"] / gap["slice_s"] < 5 for gap in gaps.values())
