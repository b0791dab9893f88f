"""The picture of ``ipvs-in-vm``: how packets grow with the number of Services, and the kernel's part of the first sync."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.result import Row, number

DATAPATH_LOOKS = {
    "iptables flat": ("#b03030", "d--"),
    "iptables": ("#e0812b", "^-"),
    "ipvs": ("#2f8f4e", "s-"),
    "nftables": ("#1f6fb4", "o-"),
}
"""Colour and line of each way to program Services, in all pictures."""
TARGET = 1.15
HIGHEST = 2.0
"""What grows more leaves the picture: its figure is written at the edge."""


def draw_ipvs(figure: Any, rows: Sequence[Row]) -> None:
    """Draw growth on the left, the first sync on the right."""
    new, established, sync = figure.subplots(1, 3, width_ratios=[3, 3, 2])
    _growth(new, [row for row in rows if row.name == "new, any Service"])
    _growth(established, [row for row in rows if row.name == "established"])
    new.set(title="new connections, over 1,024 Services", ylabel="cost of a packet, in multiples of the smallest size")
    established.set(title="open connection")
    established.legend(fontsize=8, loc="upper left")  # nothing grows there
    _first_sync(sync, [row for row in rows if row.metric == "kernel apply"])


def _growth(axes: Any, rows: Sequence[Row]) -> None:
    costs = [row for row in rows if "services" in row.params]
    for datapath, (colour, style) in DATAPATH_LOOKS.items():
        own = [row for row in costs if row.params["datapath"] == datapath]
        if not own:
            continue
        points = [(int(row.params["services"]), row.baseline_ratio or 1.0) for row in own]
        axes.plot(*zip(*points, strict=True), style, color=colour, label=datapath)
        size, growth = points[-1]
        place = (size, min(growth, HIGHEST - 0.05))
        axes.annotate(f"{growth:.2f}", place, (6, 0), textcoords="offset points", color=colour, fontsize=8)
    axes.axhline(TARGET, color="black", ls="--", lw=1, label=f"target: below {TARGET}")
    axes.set(xscale="log", xlabel="Services, 3 endpoints each", ylim=(0.9, HIGHEST))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(sorted({int(row.params["services"]) for row in costs}))
    axes.margins(x=0.15)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(alpha=0.3)


def _first_sync(axes: Any, rows: Sequence[Row]) -> None:
    """Draw a bar for each datapath at the largest size at which iptables-restore was measured, else at the largest of all."""
    restored = [row for row in rows if row.params["datapath"] == "iptables"] or rows
    services = max(int(row.params["services"]) for row in restored)
    for row in rows:
        if row.params["services"] == services:
            datapath = str(row.params["datapath"])
            axes.bar(datapath, row.value, color=DATAPATH_LOOKS[datapath][0], width=0.5)
            words = number(row.value) if row.baseline_ratio is None else f"{number(row.value)}\nratio {row.baseline_ratio:.2f}"
            axes.annotate(words, (datapath, row.value), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.set(title=f"kernel's part of the first sync,\n{services:,} Services", ylabel=rows[0].unit)
    axes.margins(y=0.15)
    axes.tick_params(axis="x", labelsize=8)
