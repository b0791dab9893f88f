"""The pictures of ``overlay`` and ``pod-attachment``: figures of each way as bars, and claims as bars against their targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.result import Row, number

COLOURS = {"superpackets": "#1f6fb4", "segmenting": "#e0812b", "": "#1f6fb4"}
MET, MISSED = "#2f8f4e", "#b03030"


def draw_overlay(figure: Any, rows: Sequence[Row]) -> None:
    """Draw five figures of every way, and the claims."""
    axes = figure.subplots(2, 3)
    for place, metric in zip(
        axes.flat,
        ("TCP throughput", "CPU for 1 GB of TCP", "64-byte packets", "CPU for a 64-byte packet", "round trip, median"),
        strict=False,
    ):
        _bars(place, rows, metric)
    axes.flat[0].legend(title="underlay", title_fontsize=8, fontsize=8, frameon=False, loc="lower right")
    _claims(axes.flat[5], rows)


def draw_attachment(figure: Any, rows: Sequence[Row]) -> None:
    """Draw packets by attachment, and the claim."""
    left, middle, right = figure.subplots(1, 3)
    _bars(left, rows, "64-byte packets for a CPU second")
    _bars(middle, rows, "64-byte packets")
    _claims(right, rows)


def _bars(axes: Any, rows: Sequence[Row], metric: str) -> None:
    """Draw a lying bar for each way, the first on top; of several underlays one below the other."""
    own = [row for row in rows if row.metric == metric and not row.name.startswith("claim")]
    names = list(dict.fromkeys(row.name for row in own))
    underlays = list(dict.fromkeys(str(row.params.get("underlay", "")) for row in own))
    height = 0.8 / len(underlays)
    for i, underlay in enumerate(underlays):
        values = {row.name: row.value for row in own if row.params.get("underlay", "") == underlay}
        places = [names.index(name) + (i - (len(underlays) - 1) / 2) * height for name in values]
        axes.barh(places, list(values.values()), height, color=COLOURS[underlay], label=underlay)
        for place, value in zip(places, values.values(), strict=True):
            axes.annotate(number(value), (value, place), (3, -3), textcoords="offset points", fontsize=7.5)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set_title(f"{metric}, {own[0].unit}", fontsize=10)
    axes.tick_params(axis="x", labelsize=8)


def _claims(axes: Any, rows: Sequence[Row]) -> None:
    """Draw each claim's ratio, its target as a black line across its bar, and whether it is met as the bar's colour."""
    claims = [row for row in rows if row.name.startswith("claim: ")]
    for i, row in enumerate(claims):
        at_least, target = "at least" in row.params, _target(row)
        met = row.value >= target if at_least else row.value <= target
        axes.barh(i, row.value, 0.6, color=MET if met else MISSED)
        axes.plot([target, target], [i - 0.42, i + 0.42], color="black", lw=2)
        words = f"{number(row.value)} (at {'least' if at_least else 'most'} {target:g})"
        axes.annotate(words, (max(row.value, target), i), (4, -3), textcoords="offset points", fontsize=7.5)
    labels = [f"{row.name.removeprefix('claim: ')}\n{row.metric}{_underlay(row)}" for row in claims]
    axes.set_yticks(range(len(claims)), labels, fontsize=6.5)
    axes.set_xscale("log")
    ends = [end for row in claims for end in (row.value, _target(row))] or [1.0]
    axes.set_xlim(min(ends) / 3, max(ends) * 12)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(max(len(claims), 5) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title("claims: ratio, and target as line", fontsize=10)


def _target(row: Row) -> float:
    return float(row.params.get("at least") or row.params["at most"])


def _underlay(row: Row) -> str:
    return f", {row.params['underlay']}" if "underlay" in row.params else ""
