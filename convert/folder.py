"""An output folder that appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwenvl_mlx.errors import OutputError

SPARE_BYTES = 64_000_000  # for all that is not weights


@contextmanager
def finished_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside ``target`` to write into, and rename it when the work is done without an error.

    What an interrupted run has left there is removed first. On any error, and on Ctrl-C, nothing remains.
    Raises ``OutputError`` when the target exists, is being written by another process, or can't be written.
    """
    refuse_existing(target)
    partial = target.with_name(f".{target.name}.partial")
    _make_parent(target)
    with _translated(target):
        lock = _locked(partial)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            _sync_folder(partial)
            refuse_existing(target)
            partial.rename(target)
            _sync_folder(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            _unlock(partial, lock)


def refuse_existing(target: Path) -> None:
    """``OutputError`` when there is something at ``target``, even a dangling link."""
    if os.path.lexists(target):
        raise OutputError(f"{target} exists: pass another --mlx-path or remove it")


def check_space(folder: Path, needed: int) -> None:
    """``OutputError`` when ``needed`` bytes of weights would not fit beside what is there."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise OutputError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, the result needs {(needed + SPARE_BYTES) / 1e9:.2f} GB: "
            "free some space or pass another --mlx-path"
        )


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{target.parent} can't be made ({error.strerror}): pass another --mlx-path"
        ) from error


@contextmanager
def _translated(target: Path) -> Iterator[None]:
    """What the system has against writing there, as an ``OutputError``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"no space left while writing {target}: free some, or pass another --mlx-path"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EFBIG):
            raise OutputError(
                f"{target} can't be written ({error.strerror}): pass another --mlx-path"
            ) from error
        raise


def _lock_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.lock")


def _locked(partial: Path) -> int:
    """A lock that the system gives back when the process dies, however that happens."""
    descriptor = os.open(_lock_path(partial), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(
            f"another process is writing {partial}: wait for it, or pass another --mlx-path"
        ) from None
    return descriptor


def _unlock(partial: Path, descriptor: int) -> None:
    _lock_path(partial).unlink(missing_ok=True)
    os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
