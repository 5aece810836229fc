"""The figures of `speed.py` as a bar chart: one panel per batch size, a bar per contender, fastest at the top."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ImportError as error:
    raise SystemExit("--plot needs matplotlib: pip install -e '.[peers]'") from error

matplotlib.use("Agg")
from matplotlib import pyplot

_OURS, _FLOAT, _OTHERS = "#1b6ca8", "#9a9a9a", "#d9a441"


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Draws what `speed.measure` returned into a file of the type that its name says."""
    batches = figures["batches"]
    figure, axes = pyplot.subplots(1, len(batches), figsize=(7 * len(batches), 4.5), squeeze=False)
    for panel, (batch, rows) in zip(axes[0], batches.items(), strict=True):
        names = sorted(rows, key=lambda n: -rows[n]["median_ms"])
        medians = [rows[n]["median_ms"] for n in names]
        colours = [_OURS if n == "int8" else _FLOAT if n.startswith("float") else _OTHERS for n in names]
        bars = panel.barh(names, medians, color=colours)
        panel.bar_label(bars, [_label(rows[n]) for n in names], padding=4, fontsize=8)
        panel.set_xlim(0, 1.45 * max(medians))
        panel.set_xlabel("ms, median")
        panel.set_title(f"{figures['model']}, {figures['size']}×{figures['size']}, batch {batch}")
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _label(row: Mapping[str, Any]) -> str:
    accuracy = "" if row["sqnr_db"] is None else f", {row['sqnr_db']:.1f} dB"
    return f"{row['median_ms']:.1f} ms, {row['times_float']:.2f}×{accuracy}"
