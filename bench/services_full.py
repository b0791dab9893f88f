"""``services-full``: the first full sync at N Services, from one JSON List to the kernel.

    fresh process   imports -> RSS            --.   work: CPU time from here ...
                    load, compile, render,      |
                    plan, print                 |   ... to here; elapsed time beside it
                    text, messages            --'   peak RSS (VmHWM): everything, imports included
    this process    iptables-legacy-restore         the kernel's part, in a namespace of its own

In modes nftables and ipvs the kernel's part is in the fresh process, as it is in the agent's: libnftables and the kernel's answers
are left out of the work, and their memory is in the RSS. Where the kernel has no IPVS the agent's part is measured alone.

Importing the agent's modules is in the RSS, for a running agent has them, and not in the time, for they do not depend on N.
Each figure is the median of a few fresh processes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from bench import cluster
from bench.control import MeasuredAgent, Work
from bench.fresh import in_fresh_process, memory
from bench.kernel import Applied, apply_in_turn, kernel_is_real, may_use_kernel, modes_here, place_for
from bench.result import Options, Row, against, median
from bench.stages import Stages

SIZES = (100, 1_000, 10_000)
REPEATS = 3


class Answer(msgspec.Struct):
    """What the measuring process returns: what it did, without the text, and MB before the load and at most."""

    work: Work
    rss_imports: float
    rss_peak: float


def measure(options: Options, repeats: int = REPEATS) -> list[Row]:
    """Measure all sizes, or the stated one."""
    if not may_use_kernel():
        print("services-full: the kernel's part is left out, it needs root", file=sys.stderr)
    found = SIZES if options.services is None else (options.services,)
    modes = modes_here("services-full", options.modes)
    return [row for mode in modes for services in found for row in _rows(services, repeats, mode)]


def _rows(services: int, repeats: int, mode: str) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory:
        path, text_path = Path(directory) / "cluster.json", Path(directory) / "text"
        cluster.write_list(path, services)
        params = {"path": str(path), "text_path": str(text_path), "mode": mode}
        answers = [in_fresh_process("bench.services_full:measure_here", params, Answer) for _ in range(repeats)]
        text = text_path.read_text()
    works = [a.work for a in answers]
    applied: list[Applied] = []
    if kernel_is_real(mode):
        applied = [one for _ in works for one in apply_in_turn([text])] if mode == "iptables" else [w.kernel for w in works]

    def row(metric: str, value: float, unit: str) -> Row:
        return Row("first sync", mode, {"services": services}, metric, value, unit)

    peak = row("peak RSS", median([a.rss_peak for a in answers]), "MB")
    imports = row("RSS after imports", median([a.rss_imports for a in answers]), "MB")
    return [
        *_times(row, works, applied),
        row("elapsed", median([w.wall for w in works]), "ms"),
        row("work after the text", median([w.after for w in works]), "ms"),
        *(row(f"stage {stage}", median([w.stages[stage] for w in works]), "ms") for stage in works[0].stages),
        against(peak, imports.value, "RSS after imports"),
        imports,
        row("text size", len(text.encode()), "bytes"),
        row("text lines", text.count("\n"), "lines"),
        *([row("written beside the text", works[0].elements, "objects")] if works[0].elements else []),
    ]


def _times(row: Callable[[str, float, str], Row], works: Sequence[Work], applied: Sequence[Applied]) -> list[Row]:
    """Set the agent's part against the kernel's, and put them together from the moment when the objects are parsed."""
    work = row("work", median([w.cpu for w in works]), "ms")
    if not applied:
        return [work]
    kernel = row("kernel apply", median([a.wall for a in applied]), "ms")
    parsed = median([w.wall - w.stages["read"] for w in works])
    return [
        against(work, kernel.value, "kernel apply"),
        kernel,
        row("kernel apply CPU", median([a.cpu for a in applied]), "ms"),
        row("from objects to kernel", parsed + kernel.value, "ms"),
    ]


# -- in the measuring process ------------------------------------------------------------------------------------------


def measure_here(path: str, text_path: str, mode: str) -> Answer:
    """Do one first sync."""
    import nodeplane.daemon  # noqa: F401, PLC0415  everything a running agent has in memory

    stages = Stages(mode)
    with place_for(mode):
        agent = MeasuredAgent(Path(path), mode, stages)
        imports = memory("VmRSS")
        try:
            with stages.watching():
                work = agent.first()
        finally:
            agent.close()
        peak = memory("VmHWM")
    Path(text_path).write_text(work.text)
    return Answer(replace(work, text=""), imports, peak)
