"""``services-full``: the first full sync at N Services, from one JSON List to the whole text.

    fresh process   imports -> RSS            --.   work: CPU time from here ...
                    load, compile, render,      |
                    plan, print                 |   ... to here; elapsed time beside it
                    text                      --'   peak RSS (VmHWM): everything, imports included
    this process    iptables-legacy-restore         the kernel's part, in a namespace of its own

Importing the agent's modules is in the RSS, for a running agent has them, and not in the time, for they do not depend on N.
Each figure is the median of a few fresh processes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import msgspec

from bench import cluster
from bench.fresh import in_fresh_process, memory
from bench.kernel import Applied, apply_in_turn, may_use_kernel
from bench.result import Options, Row, against, median

SIZES = (100, 1_000, 10_000)
REPEATS = 3


class Answer(msgspec.Struct):
    """What the measuring process returns: milliseconds, and MB before the load and at most."""

    cpu: float
    wall: float
    after: float
    stages: dict[str, float]
    rss_imports: float
    rss_peak: float


def measure(options: Options, repeats: int = REPEATS) -> list[Row]:
    """Measure all sizes, or the stated one."""
    if not may_use_kernel():
        print("services-full: the kernel's part is left out, it needs root", file=sys.stderr)
    found = SIZES if options.services is None else (options.services,)
    return [row for services in found for row in _rows(services, repeats, options.mode)]


def _rows(services: int, repeats: int, mode: str) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory:
        path, text_path = Path(directory) / "cluster.json", Path(directory) / "text"
        cluster.write_list(path, services)
        params = {"path": str(path), "text_path": str(text_path), "mode": mode}
        answers = [in_fresh_process("bench.services_full:measure_here", params, Answer) for _ in range(repeats)]
        text = text_path.read_text()
    applied = [one for _ in range(repeats) for one in apply_in_turn([text])] if may_use_kernel() else []

    def row(metric: str, value: float, unit: str) -> Row:
        return Row("first sync", mode, {"services": services}, metric, value, unit)

    work = row("work", median([a.cpu for a in answers]), "ms")
    peak = row("peak RSS", median([a.rss_peak for a in answers]), "MB")
    imports = row("RSS after imports", median([a.rss_imports for a in answers]), "MB")
    return [
        *_times(work, row("kernel apply", median([a.wall for a in applied]), "ms") if applied else None, applied),
        row("elapsed", median([a.wall for a in answers]), "ms"),
        row("work after the text", median([a.after for a in answers]), "ms"),
        *(row(f"stage {stage}", median([a.stages[stage] for a in answers]), "ms") for stage in answers[0].stages),
        against(peak, imports.value, "RSS after imports"),
        imports,
        row("text size", len(text.encode()), "bytes"),
        row("text lines", text.count("\n"), "lines"),
    ]


def _times(work: Row, kernel: Row | None, applied: list[Applied]) -> list[Row]:
    """Set the agent's part against the kernel's."""
    if kernel is None:
        return [work]
    cpu = median([a.cpu for a in applied])
    return [
        against(work, kernel.value, "kernel apply"),
        kernel,
        Row(kernel.name, kernel.mode, kernel.params, "kernel apply CPU", cpu, "ms"),
    ]


# -- in the measuring process ------------------------------------------------------------------------------------------


def measure_here(path: str, text_path: str, mode: str) -> Answer:
    """Do one first sync."""
    import nodeplane.daemon  # noqa: F401, PLC0415  everything a running agent has in memory
    from bench.control import MeasuredAgent  # noqa: PLC0415  not before the measuring process wants it
    from bench.stages import Stages  # noqa: PLC0415

    stages = Stages()
    agent = MeasuredAgent(Path(path), mode, stages)
    imports = memory("VmRSS")
    try:
        with stages.watching():
            work = agent.first()
    finally:
        agent.close()
    peak = memory("VmHWM")
    Path(text_path).write_text(work.text)
    return Answer(work.cpu, work.wall, work.after, work.stages, imports, peak)
