"""What this machine's memory allows."""

from __future__ import annotations

import os

import mlx.core as mx

CPU_SHARE = 0.75  # of the RAM; a GPU names its own recommended working set
CACHE_SHARE = 0.25  # of what is free after the model is loaded


def working_set() -> int:
    """Bytes that may be used on the default device."""
    if mx.default_device().type == mx.DeviceType.gpu:
        recommended = mx.device_info().get("max_recommended_working_set_size")
        if recommended:
            return int(recommended)
    return int(total_memory() * CPU_SHARE)


def total_memory() -> int:
    """Bytes of RAM."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_cache_bytes() -> int:
    """Budget of the prefix cache where nobody named one. Call it after the model is loaded."""
    return int(max(working_set() - mx.get_active_memory(), 0) * CACHE_SHARE)
