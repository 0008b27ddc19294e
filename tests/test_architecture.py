"""The shape of the house: imports point one way, commands start light, the public names stay."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = [
    "errors",
    "config",
    "sizes",
    "media",
    "layers",
    "models",
    "checkpoint",
    "hub",
    "processor",
    "engine",
    "api",
]
COMMANDS = ["cli", "generate", "chat", "verify", "info", "convert", "server"]
FOLDERS = {"qwenvl_mlx": ROOT / "qwenvl_mlx", "convert": ROOT / "convert", "server": ROOT / "server"}


def _modules() -> list[tuple[str, Path]]:
    found = []
    for name, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder)
            if name == "qwenvl_mlx" and relative.parts[0] in ("convert", "server"):
                continue  # the links of an uninstalled checkout
            part = name if name != "qwenvl_mlx" else relative.parts[0].removesuffix(".py")
            found.append((part, path))
    return found


def _imports(path: Path) -> set[str]:
    """Parts of the package that a file imports, those for type checking only left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qwenvl_mlx"):
            whole = (
                [node.module] if node.module != "qwenvl_mlx" else [f"qwenvl_mlx.{a.name}" for a in node.names]
            )
            names.update(whole)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names if alias.name.startswith("qwenvl_mlx."))
    return {name.split(".")[1] for name in names if "." in name}


def _rank(part: str) -> int:
    return ORDER.index(part) if part in ORDER else len(ORDER)


@pytest.mark.parametrize(("part", "path"), _modules(), ids=lambda value: getattr(value, "name", value))
def test_imports_point_one_way(part: str, path: Path) -> None:
    if part in ("__init__", "__main__", "demo"):
        return
    for imported in _imports(path) - {part, "__version__"}:
        assert _rank(imported) <= _rank(part), (
            f"{path.name} ({part}) imports {imported}, which stands above it"
        )


@pytest.mark.parametrize("command", ["generate", "chat", "info", "verify", "convert", "server"])
def test_help_needs_no_heavy_import(command: str) -> None:
    code = (
        "import resource, runpy, sys\n"
        f"sys.argv = ['{command}', '--help']\n"
        f"try: runpy.run_module('qwenvl_mlx.{command}', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'mlx_lm', 'transformers', 'torch', 'mlx.core', 'fastapi'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print('cpu', resource.getrusage(resource.RUSAGE_SELF).ru_utime)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.rsplit("cpu", 1)[1]) < 0.3


def test_public_names() -> None:
    import qwenvl_mlx

    assert sorted(qwenvl_mlx.__all__) == [
        "Engine", "Media", "Prompt", "__version__", "generate", "load", "load_model", "stream",
    ]  # fmt: skip
    for name in qwenvl_mlx.__all__:
        assert getattr(qwenvl_mlx, name) is not None


def test_the_function_generate_survives_importing_the_command() -> None:
    import qwenvl_mlx
    from qwenvl_mlx.generate import main

    assert callable(main)
    assert callable(qwenvl_mlx.generate)
    assert qwenvl_mlx.generate.__name__ == "generate"
