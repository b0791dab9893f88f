"""The pictures of ``policy-verdict``, ``policy-connect`` and ``policy-change``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.result import Row, number

LOOKS = {
    "chain per policy": ("#b03030", "d--"),
    "iptables-nft": ("#2f8f4e", "s-"),
    "iptables": ("#e0812b", "^-"),
    "nftables": ("#1f6fb4", "o-"),
}
"""Colour and line of each way to write policies."""
GREY = "#8a8a8a"
CLUSTERS = {
    "one pod": ("policies", "policies of one pod"),
    "full node": ("policies", "policies over 110 pods"),
    "peers": ("peers", "peers of one policy"),
    "blocks": ("blocks", "blocks of one policy"),
}


def draw_verdict(figure: Any, rows: Sequence[Row]) -> None:
    """Draw new connections above, open ones below, a column for each cluster."""
    costs = [row for row in rows if row.metric == "CPU per packet"]
    axes = figure.subplots(2, len(CLUSTERS), sharey="row")
    for line, (traffic, words) in zip(axes, (("new, any client", "new"), ("established", "open")), strict=True):
        for place, (name, (unit, title)) in zip(line, CLUSTERS.items(), strict=True):
            own = [row for row in costs if row.name == traffic]
            _costs(place, own, name, unit)
            place.set_title(f"{words}: {title}" if words == "new" else words, fontsize=9)
        line[0].set_ylabel("ns of CPU for one packet")
    axes[0][0].legend(fontsize=7.5, loc="upper left")


def _costs(axes: Any, rows: Sequence[Row], cluster: str, unit: str) -> None:
    sizes = sorted({int(row.params[unit]) for row in rows if row.params.get("cluster") == cluster})
    for way, (colour, style) in LOOKS.items():
        own = [row for row in rows if (row.params.get("cluster"), row.params["way"]) == (cluster, way)]
        points = sorted((int(row.params[unit]), row.value) for row in own)
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, label=way, ms=4)
    for way, style in (("conntrack", ":"), ("none", "--")):
        level = next(row.value for row in rows if row.params["way"] == way)
        axes.axhline(level, color=GREY, ls=style, lw=1.5, label=f"{way} alone" if way == "conntrack" else "no rule")
    axes.set(xscale="log", yscale="log", ylim=(500, None))
    axes.set_xticks(sizes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def draw_connect(figure: Any, rows: Sequence[Row]) -> None:
    """Draw a lying bar for each way, and the target as a line."""
    axes = figure.subplots()
    own = [row for row in rows if row.unit == "us"]
    for row in own:
        way = str(row.params["way"])
        axes.barh(way, row.value, 0.6, color=LOOKS.get(way, (GREY, ""))[0])
        ratio = "" if row.baseline_ratio is None else f", {row.baseline_ratio:.3g} times none"
        axes.annotate(f"{number(row.value)} us{ratio}", (row.value, way), (4, -3), textcoords="offset points", fontsize=9)
    targets = [float(row.params["at most"]) for row in own if "at most" in row.params]
    if targets:
        axes.axvline(targets[0] * own[0].value, color="black", ls="--", lw=1, label=f"target: {targets[0]:g} times none")
        axes.legend(fontsize=8, loc="upper right")
    policies = next(row.params["policies"] for row in own if "policies" in row.params)
    axes.set(xlabel="us", title=f"TCP connect() to a pod that {policies} policies select")
    axes.invert_yaxis()
    axes.margins(x=0.25)


def draw_change(figure: Any, rows: Sequence[Row]) -> None:
    """Draw one mode's times on the left, what was to be written on the right."""
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    sizes = sorted({int(row.params["pods"]) for row in rows})
    events = list(dict.fromkeys(row.name for row in rows if row.name != "first sync"))
    looks = (("work median", "agent", ("#63a8dc", "#1f6fb4")), ("kernel apply median", "kernel", ("#f0b98a", "#e0812b")))
    _grouped(left, rows, events, [(m, n, c[i % 2], w) for m, w, c in looks for i, n in enumerate(sizes)])
    for row in rows:
        if "at most" in row.params and row.params["pods"] == sizes[-1]:
            place, target = events.index(row.name), float(row.params["at most"])
            left.plot([place - 0.45, place + 0.45], [target, target], color="black", ls="--", lw=1)
    left.set(yscale="log", ylabel="ms", title="from the changed file to the kernel (dashes: target for the agent)")
    left.legend(fontsize=7.5, ncol=2)
    kinds = (("chains", "#b03030"), ("sets", "#2f8f4e"), ("elements", "#1f6fb4"))
    _grouped(right, rows, events, [(f"{kind} that may differ", sizes[-1], colour, kind) for kind, colour in kinds])
    right.set(yscale="symlog", title="what may differ for it", ylim=(0, None))
    right.legend(fontsize=7.5)


def _grouped(axes: Any, rows: Sequence[Row], events: Sequence[str], bars: Sequence[tuple[str, int, str, str]]) -> None:
    """Draw for each event a bar for each (metric, pods, colour, words), side by side."""
    width = 0.8 / len(bars)
    for i, (metric, pods, colour, words) in enumerate(bars):
        found = {row.name: row.value for row in rows if (row.metric, row.params["pods"]) == (metric, pods)}
        places = [k + (i - (len(bars) - 1) / 2) * width for k in range(len(events))]
        values = [found[event] for event in events]
        axes.bar(places, values, 0.9 * width, color=colour, label=f"{words}, {pods:,} pods")
        for place, value in zip(places, values, strict=True):
            axes.annotate(number(value), (place, value), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(range(len(events)), events, fontsize=8)
    axes.margins(y=0.2)
