"""Thousands of damaged files: each is read or refused with our error; none executes, hangs, or takes memory."""

from __future__ import annotations

import io
import json
import pickletools
import random
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers import reference

from qwenvl_mlx.checkpoint import load_model, read
from qwenvl_mlx.checkpoint.pickles import PickleError, tensors_of
from qwenvl_mlx.checkpoint.safetensors import check_header
from qwenvl_mlx.checkpoint.torch_file import scan_torch
from qwenvl_mlx.errors import QwenVLError

SECONDS = 2.0  # for one damaged file; a sound one takes milliseconds
MEGABYTES = 300  # that all of a test's files together may add
OPCODES = bytes(ord(opcode.code) for opcode in pickletools.opcodes)


def mutated(content: bytes, choose: random.Random) -> bytes:
    """One to eight changes: bits, bytes, opcodes, numbers at the edge, pieces cut, doubled or moved."""
    data = bytearray(content)
    for _ in range(choose.choice((1, 1, 1, 2, 4, 8))):
        at = choose.randrange(len(data)) if data else 0
        end = min(len(data), at + choose.choice((1, 2, 4, 8, 64)))
        match choose.randrange(8):
            case 0:
                data[at : at + 1] = bytes([data[at] ^ 1 << choose.randrange(8)]) if data else b""
            case 1:
                data[at : at + 1] = bytes([choose.randrange(256)])
            case 2:
                data[at : at + 1] = bytes([choose.choice(OPCODES)])
            case 3:
                data[at : at + 4] = struct.pack("<I", choose.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1)))
            case 4:
                data[at : at + 8] = struct.pack("<Q", choose.choice((0, 2**40, 2**63 - 1, 2**64 - 1)))
            case 5:
                del data[at:end]
            case 6:
                data[at:at] = data[at:end]
            case 7:
                to = choose.randrange(len(data)) if data else 0
                data[to:to] = data[at:end]
    return bytes(data)


def mutated_json(value: Any, choose: random.Random) -> Any:
    """One value somewhere in a JSON document replaced."""
    strange: list[Any] = [
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**63,
        10**30,
        0.5,
        float("nan"),
        "",
        "x",
        [],
        {},
        [[]],
        [-1],
    ]
    if isinstance(value, dict) and value and choose.random() < 0.9:
        key = choose.choice(list(value))
        if choose.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        return value | {key: mutated_json(value[key], choose)}
    if isinstance(value, list) and value and choose.random() < 0.7:
        at = choose.randrange(len(value))
        return [*value[:at], mutated_json(value[at], choose), *value[at + 1 :]]
    return choose.choice(strange)


def survives(attempt: Callable[[], object], seed: str) -> bool:
    """Whether it was read; False where it was refused. Anything else fails the test."""
    begin = time.process_time()  # other programs on the machine do not count
    message = None
    try:
        attempt()
    except QwenVLError as error:
        message = str(error)
    assert message is None or (message and "\n" not in message), seed
    assert time.process_time() - begin < SECONDS, seed
    return message is None


@pytest.fixture(autouse=True)
def little_memory() -> Any:
    """Neither what the process holds nor what MLX asks the system for, touched or not, may grow by more than that."""
    mx.reset_peak_memory()
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the peak so far is that of other tests
    before = peak_megabytes()
    yield
    assert peak_megabytes() - before < MEGABYTES
    assert mx.get_peak_memory() / 1e6 < MEGABYTES


def peak_megabytes() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes


def all_read(folder: Path) -> None:
    mx.eval(read(folder))


@pytest.fixture(scope="module")
def torch_file() -> bytes:
    """A small shard, its pickle first."""
    path = reference("qwen_vl/ckpt/tiny_chat/bin_bf16/pytorch_model-00002-of-00002.bin")
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    return packed(entries)


def packed(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def test_damaged_pickles(torch_file: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(torch_file)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        content = archive.read(name)
    choose = random.Random(1)

    def attempt(pickle: bytes) -> Callable[[], object]:
        def run() -> None:
            try:
                tensors_of(pickle)
            except PickleError as error:
                raise QwenVLError(str(error)) from error

        return run

    outcomes = [survives(attempt(mutated(content, choose)), f"pickle {n}") for n in range(3000)]
    assert 0 < sum(outcomes) < len(outcomes)


def test_damaged_pickles_of_random_opcodes() -> None:
    choose = random.Random(2)
    for _ in range(1000):
        body = b"".join(bytes([choose.choice(OPCODES)]) + choose.randbytes(choose.choice((0, 0, 1, 4)))
                        for _ in range(choose.randrange(1, 40)))  # fmt: skip
        with pytest.raises(PickleError):
            tensors_of(b"\x80\x02" + body + b".")


def test_damaged_archives(tmp_path: Path, torch_file: bytes) -> None:
    choose = random.Random(3)
    head, tail = torch_file[:4000], torch_file[-3000:]
    path = tmp_path / "pytorch_model.bin"
    outcomes = []
    for n in range(800):
        if n % 2:
            path.write_bytes(mutated(head, choose) + torch_file[4000:])
        else:
            path.write_bytes(torch_file[:-3000] + mutated(tail, choose))
        outcomes.append(survives(lambda: all_read(tmp_path), f"archive {n}"))
        survives(lambda: scan_torch(path), f"archive {n}")
    assert 0 < sum(outcomes) < len(outcomes)


def test_damaged_safetensors(tmp_path: Path) -> None:
    content = reference("qwen_vl/ckpt/tiny_hd128/model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    names = sorted(header)[:12]
    end = max(header[name]["data_offsets"][1] for name in names if name != "__metadata__")
    data = content[8 + length : 8 + length + end]
    small = {name: header[name] for name in names}
    choose = random.Random(4)
    path = tmp_path / "model.safetensors"
    outcomes = []
    for n in range(1500):
        text = json.dumps(small if n % 2 else mutated_json(small, choose)).encode()
        whole = struct.pack("<Q", len(text)) + text
        path.write_bytes((mutated(whole, choose) if n % 2 else whole) + data)
        outcomes.append(survives(lambda: all_read(tmp_path), f"safetensors {n}"))
        survives(lambda: check_header(path), f"safetensors {n}")
    assert 0 < sum(outcomes) < len(outcomes)


def test_damaged_indexes(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reference("qwen_vl/ckpt/tiny_chat/safetensors_fp32"), tmp_path / "m"))
    path = folder / "model.safetensors.index.json"
    index = path.read_bytes()
    choose = random.Random(5)
    for n in range(200):
        path.write_bytes(
            mutated(index, choose) if n % 2 else json.dumps(mutated_json(json.loads(index), choose)).encode()
        )
        survives(lambda: all_read(folder), f"index {n}")


@pytest.mark.parametrize(
    "source",
    [
        "qwen_vl/ckpt/tiny_chat/bin_bf16",
        "qwen2_vl/tiny-gptq-int4",
        "qwen2_vl/tiny-hub",
        "qwen3_vl/tiny",
        "qwen3_5/tiny",
    ],
)
def test_damaged_configs(tmp_path: Path, source: str) -> None:
    folder = Path(shutil.copytree(reference(source), tmp_path / "m"))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    choose = random.Random(6)
    outcomes = []
    for n in range(150):
        text = json.dumps(mutated_json(config, choose))
        path.write_bytes(mutated(text.encode(), choose) if n % 10 == 0 else text.encode())
        outcomes.append(survives(lambda: load_model(folder), f"config {n}: {text[:2000]}"))
    assert 0 < sum(outcomes) < len(outcomes)
