"""The pictures of results, one a benchmark: measured values, targets, and where somebody else's figures stand, said to be theirs.

Reference figures are kube-proxy 1.36's, iptables-legacy, same cluster, from another machine of this kind. They were not measured in
the run that is drawn and are drawn in grey.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.result import Result, Row, number
from bench.stages import STAGES

BLUE, ORANGE, GREEN, RED, GREY = "#1f6fb4", "#e0812b", "#2f8f4e", "#b03030", "#8a8a8a"
STAGE_COLOURS = dict(zip(STAGES, ("#1f6fb4", "#63a8dc", "#2f8f4e", "#8fc99b", "#e0812b", "#c9c9c9"), strict=True))
REFERENCE_CHANGE_MS = (550.0, 930.0)
REFERENCE_FULL_MS = 1660.0
REFERENCE_RSS_MB = 209.0
REFERENCE = "kube-proxy 1.36, reference figure,\nnot measured here"


def draw(result: Result, path: Path) -> None:
    """Draw a result into a PNG file."""
    figure = Figure(figsize=(11, 6), dpi=110, layout="constrained")
    _DRAWINGS[result.bench](figure, result.rows)
    machine = result.machine
    figure.suptitle(f"{result.bench}", fontsize=14, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(
        f"$ {machine.command}    {machine.cpu}, Linux {machine.kernel}, commit {machine.commit}",
        fontsize=8,
        color="#555555",
        x=0.01,
        ha="left",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# -- services-change ---------------------------------------------------------------------------------------------------


def _services_change(figure: Any, rows: Sequence[Row]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    lines = (
        ("endpoint added", "work median", "endpoint added, median", BLUE, "o-"),
        ("endpoint added", "work p95", "endpoint added, 95 of 100", BLUE, "o:"),
        ("service added", "work median", "Service added, median", GREEN, "s-"),
        ("service removed", "work median", "Service removed, median", ORANGE, "^-"),
        ("endpoint added", "kernel apply median", "iptables-legacy-restore and kernel,\nfor the endpoint added", RED, "d--"),
    )
    for name, metric, label, colour, style in lines:
        points = _points(rows, name, metric)
        if points:
            left.plot(*zip(*points, strict=True), style, color=colour, label=label)
    largest = max(int(row.params["services"]) for row in rows)
    left.vlines(10_000, *REFERENCE_CHANGE_MS, color=GREY, lw=6, label=f"{REFERENCE}\n(10,000 Services)")
    left.axhline(50, color="black", lw=1, ls="--")
    left.annotate("target at 10,000: 50 ms", (min(_sizes(rows)), 50), (0, 3), textcoords="offset points", fontsize=8)
    left.set(
        xscale="log", yscale="log", xlabel="Services, 3 endpoints each", ylabel="ms", title="agent's CPU time for one change"
    )
    left.set_xlim(min(_sizes(rows)) / 1.5, max(largest, 10_000) * 1.5)
    left.set_ylim(0.1, 3000)
    _plain(left.xaxis)
    _plain(left.yaxis)
    left.set_xticks(sorted({*_sizes(rows), 10_000}))
    left.grid(alpha=0.3)
    _legend_below(left, 2)
    events = list(dict.fromkeys(row.name for row in rows))
    _stage_bars(right, [(f"{event}\n{n:,}", _stages(rows, event, n)) for event in events for n in _sizes(rows)])
    right.set(title="by stage, median", xlabel="ms of CPU time")


# -- services-full -----------------------------------------------------------------------------------------------------


def _services_full(figure: Any, rows: Sequence[Row]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    largest = max(_sizes(rows))
    bars = [(f"agent\n{n:,}", _stages(rows, "first sync", n)) for n in _sizes(rows)]
    _stage_bars(left, bars)
    kernel = dict(_points(rows, "first sync", "kernel apply"))
    for n, value in kernel.items():
        left.barh(f"kernel\n{n:,}", value, color=RED)
        left.annotate(number(value), (value, f"kernel\n{n:,}"), (4, -3), textcoords="offset points", fontsize=8)
    left.set(title="first full sync: agent by stage, then the kernel's restore", xlabel="ms")
    if largest >= 10_000:
        left.axvline(1500, color="black", ls="--", lw=1, label="target for the agent at 10,000: 1,500 ms")
        left.axvline(REFERENCE_FULL_MS, color=GREY, lw=3, label=REFERENCE.replace("\n", " "))
    _legend_below(left, 3)
    points = _points(rows, "first sync", "peak RSS")
    names = [f"{n:,}" for n, _ in points]
    right.bar(names, [value for _, value in points], color=BLUE, width=0.5, label="peak RSS")
    imports = [value for _, value in _points(rows, "first sync", "RSS after imports")]
    right.bar(names, imports, color="#63a8dc", width=0.5, label="of it: interpreter and modules")
    for i, (_, value) in enumerate(points):
        right.annotate(number(value), (i, value), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    if largest >= 10_000:
        right.axhline(200, color="black", ls="--", lw=1, label="target at 10,000: 200 MB")
        right.axhline(REFERENCE_RSS_MB, color=GREY, lw=3, label=REFERENCE)
    right.set(title="memory", ylabel="MB", xlabel="Services, 3 endpoints each")
    _legend_below(right, 2)


# -- lab-up and drift-repair -------------------------------------------------------------------------------------------

_LAB_TARGETS = {(3, 30): 15.0, (10, 100): 60.0}


def _lab_up(figure: Any, rows: Sequence[Row]) -> None:
    axes = figure.subplots()
    sizes = list(dict.fromkeys((int(row.params["nodes"]), int(row.params["pods"])) for row in rows))
    for i, size in enumerate(sizes):
        here = [row for row in rows if (row.params["nodes"], row.params["pods"]) == size]
        for row, shift, colour in zip(here, (0.18, -0.18), (BLUE, ORANGE), strict=True):
            axes.barh(i + shift, row.value, 0.34, color=colour, label=row.name if i == 0 else None)
            axes.annotate(f"{row.value:.1f} s", (row.value, i + shift), (4, -3), textcoords="offset points", fontsize=9)
        if size in _LAB_TARGETS:
            target = _LAB_TARGETS[size]
            axes.plot([target, target], [i - 0.4, i + 0.4], "--", color="black", lw=1)
            axes.annotate(
                f"target: {target:g} s", (target, i + 0.3), (-4, 0), textcoords="offset points", ha="right", fontsize=8
            )
    axes.set_yticks(range(len(sizes)), [f"{nodes} nodes\n{pods} pods" for nodes, pods in sizes])
    axes.set(xlabel="seconds", title="from the command to every node in sync, and to nothing left")
    axes.legend(fontsize=8, loc="lower right")


def _drift_repair(figure: Any, rows: Sequence[Row]) -> None:
    left, right = figure.subplots(1, 2)
    services = int(rows[0].params["services"])
    names = list(dict.fromkeys(row.name for row in rows if row.metric == "until back median"))
    for metric, shift, colour in (("until back median", -0.18, BLUE), ("until back longest", 0.18, "#63a8dc")):
        _bars(left, {name: _value(rows, name, metric) for name in names}, colour, shift, metric)
    left.axhline(5000, color="black", ls="--", lw=1)
    left.annotate("target: 5,000 ms", (-0.4, 5000), (0, 3), textcoords="offset points", fontsize=8)
    left.set(title=f"{services:,} Services: until all is back", ylabel="ms", ylim=(0, 5600))
    _legend_below(left, 2)
    texts = {"first sync": _value(rows, "first sync", "text size")} | {n: _value(rows, n, "text size") for n in names}
    _bars(right, texts, GREEN)
    right.set(title="text written", ylabel="bytes", yscale="log")
    right.margins(y=0.15)
    _plain(right.yaxis)


# -- shared ------------------------------------------------------------------------------------------------------------


def _sizes(rows: Sequence[Row]) -> list[int]:
    return sorted({int(row.params["services"]) for row in rows})


def _points(rows: Sequence[Row], name: str, metric: str) -> list[tuple[int, float]]:
    """Return (Services, value) of each row of that name and metric, by size."""
    return sorted((int(row.params["services"]), row.value) for row in rows if (row.name, row.metric) == (name, metric))


def _stages(rows: Sequence[Row], name: str, services: int) -> dict[str, float]:
    here = [row for row in rows if row.name == name and row.params["services"] == services]
    return {row.metric.removeprefix("stage "): row.value for row in here if row.metric.startswith("stage ")}


def _stage_bars(axes: Any, bars: Sequence[tuple[str, dict[str, float]]]) -> None:
    """Draw one stacked bar for each (label, stage -> value), the first on top, its sum beside it."""
    for label, stages in bars:
        end = 0.0
        for stage, value in stages.items():
            axes.barh(label, value, left=end, color=STAGE_COLOURS[stage], label=stage if label == bars[0][0] else None)
            end += value
        axes.annotate(number(end), (end, label), (4, -3), textcoords="offset points", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(axis="y", labelsize=8)
    _legend_below(axes, 3)


def _bars(axes: Any, values: dict[str, float], colour: str, shift: float = 0.0, label: str = "") -> None:
    """Draw an upright bar for each name, its value on top; several sets stand side by side with different shifts."""
    places = [i + shift for i in range(len(values))]
    axes.bar(places, list(values.values()), 0.34, color=colour, label=label)
    for place, value in zip(places, values.values(), strict=True):
        axes.annotate(number(value), (place, value), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(values)), list(values))


def _value(rows: Sequence[Row], name: str, metric: str) -> float:
    return next(row.value for row in rows if (row.name, row.metric) == (name, metric))


def _legend_below(axes: Any, columns: int) -> None:
    """Put the legend where no figure can be under it."""
    axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=columns, frameon=False)


def _plain(axis: Any) -> None:
    """Print 1,000 rather than 10^3."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axis.set_minor_formatter(NullFormatter())


_DRAWINGS: dict[str, Callable[[Any, Sequence[Row]], None]] = {
    "services-change": _services_change,
    "services-full": _services_full,
    "lab-up": _lab_up,
    "drift-repair": _drift_repair,
}
