"""Bars of a comparison's medians."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(report: dict[str, Any], path: Path) -> None:
    """One panel a part, one bar a program and case, from the report of ``compare``."""
    import matplotlib.pyplot as plt

    from benchmarks.compare import PARTS, Result

    rows = [Result(**row) for row in report["results"] if "samples" in row]
    if not rows:
        raise SystemExit("there is no comparison to draw")
    cases = list(dict.fromkeys(row.case for row in rows))
    programs = list(dict.fromkeys(row.program for row in rows))
    figure, panels = plt.subplots(1, len(PARTS), figsize=(4 * len(PARTS), 3.5), constrained_layout=True)
    for panel, part in zip(panels, PARTS, strict=True):
        for index, program in enumerate(programs):
            # not all programs run every case
            bars = [(cases.index(row.case), row.median(part)) for row in rows if row.program == program]
            places = [place + index / (len(programs) + 1) for place, _ in bars]
            medians = [median for _, median in bars]
            panel.bar(places, medians, width=1 / (len(programs) + 1), label=program)
        panel.set_title(f"{part} (s)")
        panel.set_xticks(range(len(cases)), cases, rotation=30, ha="right")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(", ".join(f"{key} {value}" for key, value in report["device"].items()))
    figure.savefig(path, dpi=150)
