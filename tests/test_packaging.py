"""The wheel works outside the checkout: built, installed into a fresh environment, its commands run."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a copy: building in place leaves folders in the checkout
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, names):
        if name.startswith("tests/") or not (ROOT / name).exists():
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "is absent from the `packages`" not in built.stdout + built.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "models/base.py",
        "convert/__main__.py",
        "server/__main__.py",
        "server/page.html",
        "demo/model.safetensors",
        "demo/samples/shapes-1.png",
        "demo/samples/answers.json",
        "py.typed",
    ):
        assert f"qwenvl_mlx/{wanted}" in names
    assert not [name for name in names if name.startswith("tests/")]


def test_commands_run_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        str(wheel),
    ]
    subprocess.run(pip, check=True, timeout=300)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    # The dependencies come from this environment: what is tested is the wheel, not the network.
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    for command in ("convert", "generate", "server", "info"):
        done = subprocess.run(
            [python, "-m", f"qwenvl_mlx.{command}", "--help"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout
    where = subprocess.run(
        [python, "-c", "import qwenvl_mlx; print(qwenvl_mlx.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert str(site) in where.stdout
    picture = site / "qwenvl_mlx" / "demo" / "samples" / "number-1.png"
    options = ["--model", "demo", "--image", str(picture), "--prompt", "Read the number.", "--device", "cpu"]
    done = subprocess.run(
        [python, "-m", "qwenvl_mlx.generate", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "The number is 78.", done.stderr
