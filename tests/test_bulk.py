"""Bulk mode: every line is answered once, a bad one fails alone, and a second run goes on where the first ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeModel, FakeProcessor, picture
from helpers import reference

from qwenvl_mlx.bulk import Bulk, Task, keep_finished, read_tasks
from qwenvl_mlx.engine import Engine, EngineOptions, GenerationOptions
from qwenvl_mlx.errors import PromptError
from qwenvl_mlx.generate import main
from qwenvl_mlx.processor.base import MediaOptions

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = """\
{%- for message in messages %}{% for part in message.content -%}
{{ part.text if part.type == "text" else "<|vision_start|><|image_pad|><|vision_end|>" }}
{%- endfor %}{% endfor -%}"""


def run(tasks: list[Task], **defaults: Any) -> dict[int, dict[str, Any]]:
    options = GenerationOptions(max_tokens=5, ignore_eos=True)
    with Engine(FakeModel(), FakeProcessor(), EngineOptions(max_batch=3)) as engine:
        records = list(Bulk(engine, options, MediaOptions(), defaults).run(tasks))
    assert len(records) == len(tasks)
    return {record["line"]: record for record in records}


def task(line: int, **fields: Any) -> Task:
    return Task(line, json.dumps(fields))


def test_every_line_is_answered_and_bad_ones_fail_alone() -> None:
    tasks = [task(number, prompt=f"question {number}") for number in range(1, 20)]
    tasks[4] = Task(5, "{not json")
    tasks[6] = task(7, prompt="x", colour="red")
    tasks[7] = task(8, prompt="x", temperature=-1)
    tasks[8] = task(9, prompt="x", max_tokens="many")
    tasks[9] = task(10, messages=[{"role": "user", "content": "hi"}], id="mine")
    tasks[10] = task(11)
    tasks[11] = task(12, prompt="y" * 2000)
    records = run(tasks)
    failed = {line: record["error"] for line, record in records.items() if "error" in record}
    assert set(failed) == {5, 7, 8, 9, 11, 12}
    assert "colour" in failed[7]
    assert "temperature" in failed[8]
    assert "limit" in failed[12]
    assert records[10]["id"] == "mine"
    assert len(records[1]["tokens"]) == 5


def test_other_line_separators_are_part_of_the_text(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "c\u0085d"}\n', encoding="utf-8")
    tasks = read_tasks(source)
    assert [one.read()["prompt"] for one in tasks] == ["a\u2028b", "c\u0085d"]
    answers = [
        json.dumps({"line": one.line, "key": one.key, "text": "e\u2028f"}, ensure_ascii=False)
        for one in tasks
    ]
    output.write_text("\n".join(answers) + "\n", encoding="utf-8")
    assert len(keep_finished(output, tasks)) == 2


def test_a_large_batch_fits_the_queue() -> None:
    tasks = [task(number, prompt=str(number)) for number in range(1, 30)]
    with Engine(FakeModel(), FakeProcessor(), EngineOptions(max_batch=9, max_queue=4)) as engine:
        records = list(Bulk(engine, GenerationOptions(max_tokens=3), MediaOptions(), {}).run(tasks))
    assert not any("error" in record for record in records)


def test_options_of_a_line_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    records = run([task(1, max_tokens=2), task(2, prompt="other")], prompt="usual")
    assert len(records[1]["tokens"]) == 2
    assert records[2]["tokens"] != records[1]["tokens"]


def test_a_folder_is_a_task_for_each_picture(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).touch()
    assert [Path(task.read()["image"]).name for task in read_tasks(tmp_path)] == ["a.JPG", "b.png"]
    with pytest.raises(PromptError, match="--batch"):
        read_tasks(tmp_path / "none.jsonl")


def test_only_whole_answers_to_the_same_lines_are_kept(tmp_path: Path) -> None:
    tasks = [task(number, prompt=str(number)) for number in (1, 2, 3, 4)]
    lines = [
        {"line": 1, "key": tasks[0].key, "text": "one"},
        {"line": 2, "key": tasks[1].key, "error": "no"},
        {"line": 3, "key": "of another text", "text": "three"},
    ]
    out = tmp_path / "out.jsonl"
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    out.write_text(whole + '{"line": 4, "key": "' + tasks[3].key + '", "te')
    assert keep_finished(out, tasks) == {tasks[0].name}
    assert [json.loads(line) for line in out.read_text().splitlines()] == [lines[0]]


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A real tiny checkpoint with a template of our own."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in reference("qwen2_vl/tiny-hub").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def command(model: str, source: Path, output: Path, tokens: int) -> list[str]:
    options = ["--model", model, "--batch", str(source), "--output", str(output), "--device", "cpu"]
    return [*options, "--max-tokens", str(tokens), "--ignore-eos", "--temp", "0", "--dtype", "float32"]


def test_the_command_goes_on_after_a_kill(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(40)))
    arguments = [sys.executable, "-m", "qwenvl_mlx.generate", *command(model, source, output, 60)]
    first = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 60
    while (not output.exists() or not output.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = output.read_text().count("\n")
    assert 0 < before < 40
    assert main(command(model, source, output, 60)) == 0
    assert f"{before} were there" in capsys.readouterr().err
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(record["line"] for record in records) == list(range(1, 41))
    assert main(command(model, source, output, 60)) == 0  # nothing left to do
    assert len(output.read_text().splitlines()) == 40


def test_a_bad_picture_fails_its_line_and_the_exit_code(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": "a"}, {"prompt": "b", "image": str(tmp_path / "none.png")}, {"prompt": "c"}]
    source.write_text("\n".join(map(json.dumps, lines)))
    assert main(command(model, source, output, 3)) == 1
    records = {record["line"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert "none.png" in records[2]["error"]
    assert "text" in records[1]
    assert "text" in records[3]


def test_usage(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--model", "m", "--batch", "in.jsonl"])
    assert stop.value.code == 2


def test_pictures_of_a_line_reach_the_model() -> None:
    fake = FakeModel()
    item = picture(3)
    options = GenerationOptions(max_tokens=2, ignore_eos=True)
    with Engine(fake, FakeProcessor()) as engine:
        bulk = Bulk(engine, options, MediaOptions(), {"image": [item], "prompt": "what?"})
        (record,) = bulk.run([task(1)])
    assert fake.encoded == [item.digest]
    assert record["finish_reason"] == "length"
