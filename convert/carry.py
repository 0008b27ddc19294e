"""What goes from the source's folder into the result beside weights: tokenizer, templates, licence, checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from qwenvl_mlx.checkpoint.writing import write_bytes
from qwenvl_mlx.processor.qwen_tokenizer import tokenizer_json

CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
CHUNK = 4 << 20


def carry_over(source: Path, folder: Path) -> None:
    """Copy the small files, and give the original Qwen-VL's vocabulary its ``tokenizer.json``."""
    for pattern in CARRIED:
        for path in sorted(source.glob(pattern)):
            write_bytes(folder / path.name, path.read_bytes())
    tiktoken = source / "qwen.tiktoken"
    if tiktoken.exists() and not (folder / "tokenizer.json").exists():
        write_bytes(folder / "tokenizer.json", tokenizer_json(tiktoken).encode())


@contextmanager
def checksums(paths: Sequence[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """Compute the sha256 of files in another thread while the body runs; call what is given to get them."""
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(lambda: {path.name: _sha256(path, stop) for path in sorted(paths)})
        try:
            yield work.result
        finally:
            stop.set()


def _sha256(path: Path, stop: Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while not stop.is_set() and (chunk := file.read(CHUNK)):
            digest.update(chunk)
    return digest.hexdigest()
