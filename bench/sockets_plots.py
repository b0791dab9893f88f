"""The pictures of ``service-connect`` and ``services-sockets``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.result import Row, number

BLUE, GREY = "#1f6fb4", "#8a8a8a"


def draw_service_connect(figure: Any, rows: Sequence[Row]) -> None:
    """Draw each mode's connect() to a Service beside the one straight to its pod."""
    axes = figure.subplots()
    modes = list(dict.fromkeys(row.mode for row in rows))
    for to, shift, colour in (("pod", 0.18, GREY), ("Service", -0.18, BLUE)):
        for place, mode in enumerate(modes):
            row = next(row for row in rows if (row.mode, row.params["to"]) == (mode, to))
            ratio = f", {row.baseline_ratio:.2f}" if row.baseline_ratio else ""
            axes.barh(place + shift, row.value, 0.34, color=colour, label=f"to the {to}" if place == 0 else None)
            axes.annotate(
                f"{row.value:.1f}{ratio}", (row.value, place + shift), (4, -3), textcoords="offset points", fontsize=9
            )
    axes.set_yticks(range(len(modes)), modes)
    services = rows[0].params["services"]
    axes.set(xlabel="us until connect() returns", title=f"TCP connect() at {services:,} Services, and straight to the pod")
    axes.legend(fontsize=8, loc="lower right")


def draw_sockets(figure: Any, rows: Sequence[Row]) -> None:
    """Draw what is written for sockets at each size: all of it, and one change."""
    sides = figure.subplots(1, 2)
    for axes, metric, title in zip(
        sides, ("programmed after compiling", "one change, median"), ("all of it, after compiling", "one change"), strict=True
    ):
        shown = [row for row in rows if row.metric == metric]
        for place, row in enumerate(shown):
            axes.bar(place, row.value, 0.5, color=BLUE)
            axes.annotate(number(row.value), (place, row.value), (0, 3), textcoords="offset points", ha="center", fontsize=9)
        axes.axhline(float(shown[0].params["at most"]), color="black", ls="--", lw=1, label="target")
        axes.set_xticks(range(len(shown)), [f"{row.params['services']:,}" for row in shown])
        axes.set(title=title, ylabel="ms", xlabel="Services, 3 endpoints each")
        axes.legend(fontsize=8, loc="upper left")
