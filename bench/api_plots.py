"""The picture of ``api-sync``: what one waits for and what it costs, at each size, beside kube-proxy's own figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.result import Row, number

TARGETS = {"first sync": 4000.0, "endpoint alone": 100.0, "storm": 3000.0}
"""Milliseconds at 10,000 Services in mode nftables."""
REFERENCES = {
    "nftables": {"first sync": 15_100.0, "endpoint alone": 3800.0},
    "iptables": {"first sync": 1660.0, "endpoint alone": 550.0},
}
"""kube-proxy 1.36, reference figures for 10,000 Services, not measured here; a second of batching is not in them."""
METRICS = {
    "first sync": ("first sync", "from start to kernel", "first sync"),
    "endpoint alone": ("endpoint alone", "from event to kernel median", "one endpoint, after quiet"),
    "endpoint after endpoint": ("endpoint after endpoint", "from event to kernel median", "one endpoint after another"),
    "storm": ("storm", "from first event to done", "a thousand in a second"),
}
COLOURS = ("#63a8dc", "#1f6fb4", "#2f8f4e")


def draw_api(figure: Any, rows: Sequence[Row]) -> None:
    """Draw one mode's rows."""
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    sizes = sorted({int(row.params["services"]) for row in rows})
    labels = [words for _, _, words in METRICS.values()]
    for i, size in enumerate(sizes):
        values = [_value(rows, size, name, metric) for name, metric, _ in METRICS.values()]
        places = [k + (i - len(sizes) / 2 + 0.5) * 0.8 / len(sizes) for k in range(len(values))]
        left.bar(places, values, 0.75 / len(sizes), color=COLOURS[i % len(COLOURS)], label=f"{size:,} Services")
        for place, value in zip(places, values, strict=True):
            left.annotate(number(value), (place, value), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    for k, key in enumerate(METRICS):
        for level, colour, style in (
            (TARGETS.get(key) if rows[0].mode == "nftables" else None, "black", "--"),
            (REFERENCES.get(rows[0].mode, {}).get(key), "#8a8a8a", "-"),
        ):
            if level is not None and 10_000 in sizes:
                left.plot([k - 0.4, k + 0.4], [level, level], style, color=colour, lw=1 if style == "--" else 3)
    left.set(yscale="log", ylabel="ms", title="from the API to the kernel (dashes: target; grey: kube-proxy 1.36, reference)")
    left.set_xticks(range(len(labels)), labels, fontsize=8)
    left.margins(y=0.2)
    left.legend(fontsize=8)
    memory = [_value(rows, size, "afterwards", "peak RSS") for size in sizes]
    right.bar([f"{size:,}" for size in sizes], memory, color=COLOURS[0], width=0.5)
    for i, value in enumerate(memory):
        right.annotate(number(value), (i, value), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    right.axhline(250, color="black", ls="--", lw=1)
    right.set(title="peak RSS", ylabel="MB", xlabel="Services")


def _value(rows: Sequence[Row], size: int, name: str, metric: str) -> float:
    return next(row.value for row in rows if (row.params["services"], row.name, row.metric) == (size, name, metric))
