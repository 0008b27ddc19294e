"""Load several media at once: Pillow and NumPy leave Python to the other threads while they work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from qwenvl_mlx.media import Media

T = TypeVar("T")
MOST = 8


def side_by_side(
    load: Callable[[T], Media],
    items: Sequence[T],
    sources: Sequence[Any],
    *,
    check: Callable[[list[Media]], None] = lambda _: None,
) -> list[Media]:
    """``load`` of each of ``items``, in order. If ``check`` of those so far raises, no more begin.

    ``sources``: what is loaded. A Pillow image that is there twice may be decoded on first use, which two threads
    must not do at once: then all are loaded one after the other.
    """
    objects = [id(source) for source in sources if not isinstance(source, str)]
    twins = len(set(objects)) < len(objects)
    workers = 1 if twins else min(len(items), os.cpu_count() or 1, MOST)
    media: list[Media] = []
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        try:
            for item in pool.map(load, items):
                media.append(item)
                check(media)
        finally:
            pool.shutdown(cancel_futures=True)
    return media
