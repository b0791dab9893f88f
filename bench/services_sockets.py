"""``services-sockets``: what mode ``ebpf`` writes for sockets at N Services, beside the rules of mode ``nftables`` beneath it.

    fresh process   compile, render     -> programs loaded, maps made and filled, programs at a cgroup     programmed
                                        -> one Service gets an endpoint, and the maps say so               one change
    agents          the real agent in mode nftables, and in mode ebpf, over the same cluster               peak RSS

The first is what a node waits for after everything is compiled; the second is the median of many.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
import time
from pathlib import Path

import msgspec

from bench import cluster
from bench.fresh import in_fresh_process
from bench.kernel import may_use_kernel, own_cgroup, own_namespace
from bench.result import Options, Row, against, median, p95
from bench.running import configuration, running_agent
from netnslab import mounts
from nodeplane.commands import Failed

SIZES = (10, 10_000, 50_000)
CHANGES = 50
REPEATS = 3
MOST_PROGRAMMED, MOST_CHANGE, MOST_MEMORY = 150.0, 2.0, 10.0
"""Milliseconds for 50,000 Services and for one change; MB more than in mode ``nftables``."""
LONGEST = 300.0


class Took(msgspec.Struct):
    """Milliseconds: until all of it was programmed, and each change."""

    programmed: float
    changes: list[float]


def measure(options: Options, changes: int = CHANGES, repeats: int = REPEATS) -> list[Row]:
    """Measure all sizes, or the stated one. Raises Failed."""
    if not may_use_kernel():
        raise Failed("services-sockets: putting programs at a cgroup needs root")
    if "ebpf" not in options.modes:
        raise Failed("services-sockets: measured in mode ebpf only")
    sizes = SIZES if options.services is None else (options.services,)
    rows: list[Row] = []
    for services in sizes:
        params = {"services": services, "changes": min(changes, services)}
        took = [in_fresh_process("bench.services_sockets:measure_here", params, Took) for _ in range(repeats)]
        found = [one for each in took for one in each.changes]
        rows += [
            _row("programmed after compiling", services, median([one.programmed for one in took]), MOST_PROGRAMMED),
            _row("one change, median", services, median(found), MOST_CHANGE),
            _row("one change, p95", services, p95(found), None),
        ]
    largest = min(sizes[-1], 10_000)
    peaks = {mode: _peak(mode, largest) for mode in ("nftables", "ebpf")}
    memory = Row("agent", "ebpf", {"services": largest, "at most more": MOST_MEMORY}, "peak RSS", peaks["ebpf"], "MB")
    return [*rows, against(memory, peaks["nftables"], "mode nftables")]


def _row(metric: str, services: int, value: float, most: float | None) -> Row:
    return Row("sockets", "ebpf", {"services": services, **({"at most": most} if most else {})}, metric, value, "ms")


def _peak(mode: str, services: int) -> float:
    """Return the MB that an agent has at most until it is in sync."""
    name = f"np-bench-{os.getpid()}-{secrets.token_hex(3)}"
    with contextlib.ExitStack() as undo:
        root = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="nodeplane-bench-")))
        namespace = undo.enter_context(own_namespace())
        cgroup = undo.enter_context(own_cgroup(name)) if mode == "ebpf" else None
        (root / "objects").mkdir()
        cluster.write_list(root / "objects/cluster.json", services)
        config = configuration(mode, **({"cgroup": mounts.CGROUP} if cgroup is not None else {}))
        with running_agent(namespace, root, config, cgroup=cgroup) as agent:
            agent.wait(lambda: agent.is_synced(services), "the agent's word that it is in sync", LONGEST)
            return agent.peak_rss()


# -- in the measuring process ------------------------------------------------------------------------------------------


def measure_here(services: int, changes: int) -> Took:
    """Program everything once, then change one Service after the other."""
    from bench.sockets_rig import Rig  # noqa: PLC0415 (what a mode needs is imported where it is measured)

    with own_cgroup(f"np-bench-{os.getpid()}-{secrets.token_hex(3)}") as cgroup, Rig(cgroup, services) as rig:
        started = time.perf_counter()
        rig.sync()
        programmed = 1000 * (time.perf_counter() - started)
        took = []
        for i in range(changes):
            rig.grow(i * services // changes)
            started = time.perf_counter()
            rig.sync()
            took.append(1000 * (time.perf_counter() - started))
        return Took(programmed, took)
