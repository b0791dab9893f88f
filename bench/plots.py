"""The pictures of results, one a benchmark: measured values, targets, and where somebody else's figures stand, said to be theirs.

Reference figures are kube-proxy 1.36's in the same mode, same cluster, from another machine of this kind. They were not measured in
the run that is drawn and are drawn in grey. Where a run has several modes, each has a picture of its own, one below the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.api_plots import draw_api
from bench.ipvs_plots import DATAPATH_LOOKS, draw_ipvs
from bench.overlay_plots import draw_attachment, draw_overlay
from bench.policy_plots import draw_change, draw_connect, draw_verdict
from bench.result import Result, Row, number
from bench.sockets_plots import draw_service_connect, draw_sockets
from bench.stages import STAGES

BLUE, ORANGE, GREEN, RED, GREY = "#1f6fb4", "#e0812b", "#2f8f4e", "#b03030", "#8a8a8a"
STAGE_COLOURS = dict(zip(STAGES, ("#1f6fb4", "#63a8dc", "#2f8f4e", "#8fc99b", "#e0812b", "#c9c9c9"), strict=True))


class Lines(NamedTuple):
    """What is drawn beside the figures of a mode, all at 10,000 Services: targets, and kube-proxy's own figures where known."""

    change_ms: float
    full_ms: float
    rss_mb: float
    reference_change_ms: tuple[float, float] | None = None
    reference_full_ms: float | None = None
    reference_rss_mb: float | None = None


LINES = {
    "iptables": Lines(50, 1500, 200, (550, 930), 1660, 209),
    "ipvs": Lines(10, 2000, 250),
    "nftables": Lines(30, 1500, 250, (3700, 3900), 15_100, 226),
}
REFERENCE = "kube-proxy 1.36, reference figure,\nnot measured here"


def draw(result: Result, path: Path) -> None:
    """Draw a result into a PNG file."""
    modes = _modes(result) if result.bench in _BY_MODE else [""]
    figure = Figure(figsize=(11, _INCHES.get(result.bench, 6) * len(modes)), dpi=110, layout="constrained")
    for part, mode in zip(figure.subfigures(len(modes), 1, squeeze=False)[:, 0], modes, strict=True):
        rows = [row for row in result.rows if mode in {"", row.mode}]
        if mode:
            part.suptitle(f"mode {mode}", fontsize=11)
        _DRAWINGS[result.bench](part, rows)
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


def _modes(result: Result) -> list[str]:
    return list(dict.fromkeys(row.mode for row in result.rows))


# -- services-change ---------------------------------------------------------------------------------------------------


def _services_change(figure: Any, rows: Sequence[Row]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    lines = (
        ("endpoint added", "work median", "endpoint added, median", BLUE, "o-"),
        ("endpoint added", "work p95", "endpoint added, 95 of 100", BLUE, "o:"),
        ("service added", "work median", "Service added, median", GREEN, "s-"),
        ("service removed", "work median", "Service removed, median", ORANGE, "^-"),
        ("endpoint added", "kernel apply median", "the kernel's part of it", RED, "d--"),
    )
    for name, metric, label, colour, style in lines:
        points = _points(rows, name, metric)
        if points:
            left.plot(*zip(*points, strict=True), style, color=colour, label=label)
    largest = max(int(row.params["services"]) for row in rows)
    lines_of = LINES[rows[0].mode]
    if lines_of.reference_change_ms:
        left.vlines(10_000, *lines_of.reference_change_ms, color=GREY, lw=6, label=f"{REFERENCE}\n(10,000 Services)")
    target = lines_of.change_ms
    left.axhline(target, color="black", lw=1, ls="--")
    words = f"target at 10,000: {target:g} ms"
    left.annotate(words, (min(_sizes(rows)), target), (0, 3), textcoords="offset points", fontsize=8)
    left.set(
        xscale="log", yscale="log", xlabel="Services, 3 endpoints each", ylabel="ms", title="agent's CPU time for one change"
    )
    left.set_xlim(min(_sizes(rows)) / 1.5, max(largest, 10_000) * 1.5)
    left.set_ylim(0.1, 6000)
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
    lines = LINES[rows[0].mode]
    bars = [(f"agent\n{n:,}", _stages(rows, "first sync", n)) for n in _sizes(rows)]
    _stage_bars(left, bars)
    kernel = dict(_points(rows, "first sync", "kernel apply"))
    for n, value in kernel.items():
        left.barh(f"kernel\n{n:,}", value, color=RED)
        left.annotate(number(value), (value, f"kernel\n{n:,}"), (4, -3), textcoords="offset points", fontsize=8)
    left.set(title="first full sync: agent by stage, then the kernel's part", xlabel="ms")
    if largest >= 10_000:
        left.axvline(lines.full_ms, color="black", ls="--", lw=1, label=f"target at 10,000: {lines.full_ms:,.0f} ms")
        if lines.reference_full_ms:
            left.axvline(lines.reference_full_ms, color=GREY, lw=3, label=REFERENCE.replace("\n", " "))
    _legend_below(left, 3)
    points = _points(rows, "first sync", "peak RSS")
    names = [f"{n:,}" for n, _ in points]
    right.bar(names, [value for _, value in points], color=BLUE, width=0.5, label="peak RSS")
    imports = [value for _, value in _points(rows, "first sync", "RSS after imports")]
    right.bar(names, imports, color="#63a8dc", width=0.5, label="of it: interpreter and modules")
    for i, (_, value) in enumerate(points):
        right.annotate(number(value), (i, value), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    if largest >= 10_000:
        right.axhline(lines.rss_mb, color="black", ls="--", lw=1, label=f"target at 10,000: {lines.rss_mb:g} MB")
        if lines.reference_rss_mb:
            right.axhline(lines.reference_rss_mb, color=GREY, lw=3, label=REFERENCE)
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


# -- packet-cost -------------------------------------------------------------------------------------------------------


def _packet_cost(figure: Any, rows: Sequence[Row]) -> None:
    costs = [row for row in rows if row.metric == "CPU per packet"]
    sizes = sorted({int(row.params["services"]) for row in costs if "services" in row.params})
    panels = {
        "new": "new connection to a Service",
        "new, any Service": "new connections to 1,024 Services in turn",
        "new, no Service": "new connection to a pod",
        "established": "open connection",
    }
    top = 1.6 * max(row.value for row in costs)
    for axes, (name, title) in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, panels.items(), strict=True):
        for datapath, (colour, style) in DATAPATH_LOOKS.items():
            points = _points([row for row in costs if row.params["datapath"] == datapath], name, "CPU per packet")
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, label=datapath)
        for datapath, style in (("conntrack", ":"), ("forwarding", "--")):
            level = next(row.value for row in costs if (row.name, row.params["datapath"]) == (name, datapath))
            axes.axhline(level, color=GREY, ls=style, lw=1.5, label=f"{datapath} alone")
        axes.set(xscale="log", yscale="log", title=title, ylim=(None, top))
        _plain(axes.xaxis)
        _plain(axes.yaxis)
        axes.set_xticks(sizes)
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(alpha=0.3)
    for axes in (figure.axes[0], figure.axes[2]):
        axes.set_ylabel("ns of CPU for one packet")
    for axes in (figure.axes[2], figure.axes[3]):
        axes.set_xlabel("Services, 3 endpoints each")
    figure.axes[3].legend(fontsize=8, loc="upper left")  # nothing grows there


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


# -- cni-add -----------------------------------------------------------------------------------------------------------


def _cni_add(figure: Any, rows: Sequence[Row]) -> None:
    axes = figure.subplots()
    shown = [row for row in rows if row.metric == "p50" and "at a time" in row.params]
    for plugin, shift, colour in (("nodeplane-cni", -0.18, BLUE), ("bridge", 0.18, ORANGE)):
        mine = [row for row in shown if row.name.startswith(f"{plugin}:")]
        bars = {f"{row.name.split(': ')[1]}\n{row.params['at a time']} at a time": row.value for row in mine}
        _bars(axes, bars, colour, shift, plugin)
    axes.axhline(150, color="black", ls="--", lw=1)
    axes.annotate("target for an ADD alone: 150 ms", (-0.4, 150), (0, 3), textcoords="offset points", fontsize=8)
    axes.set(title="what a container runtime waits for, median", ylabel="ms")
    axes.legend(fontsize=8, loc="upper left")


_BY_MODE = frozenset({"services-change", "services-full", "api-sync", "policy-change"})
_INCHES = {
    "overlay": 9.0,
    "pod-attachment": 4.0,
    "policy-verdict": 7.0,
    "policy-connect": 4.0,
    "service-connect": 4.0,
    "services-sockets": 4.5,
    "policy-change": 4.5,
}
"""Height of a picture, where it is not 6."""

_DRAWINGS: dict[str, Callable[[Any, Sequence[Row]], None]] = {
    "services-change": _services_change,
    "services-full": _services_full,
    "lab-up": _lab_up,
    "api-sync": draw_api,
    "service-connect": draw_service_connect,
    "services-sockets": draw_sockets,
    "drift-repair": _drift_repair,
    "packet-cost": _packet_cost,
    "ipvs-in-vm": draw_ipvs,
    "overlay": draw_overlay,
    "pod-attachment": draw_attachment,
    "cni-add": _cni_add,
    "policy-verdict": draw_verdict,
    "policy-connect": draw_connect,
    "policy-change": draw_change,
}
