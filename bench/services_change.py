"""``services-change``: what one change costs the agent in a cluster of N Services, from the changed file to the text.

    endpoint added     a slice's file is replaced; each time that of another Service
    service added      the file of a Service and the file of its slice appear
    service removed    both go (the source waits 50 ms for a deletion to be over; that is elapsed time, not work)

and, separately, what the kernel takes for an added endpoint: iptables-legacy-restore with the text, afterwards; in the
other modes libnftables and the kernel's answers, in the agent's process and left out of its work. Objects are JSON, one a file in one
directory. With each N the changes are measured in a fresh process; smaller N give the baseline: a cost bounded by the change has
a ratio near 1 at every N.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench import cluster
from bench.control import MeasuredAgent, Work
from bench.fresh import in_fresh_process
from bench.kernel import Applied, apply_in_turn, kernel_is_real, may_use_kernel, modes_here, place_for
from bench.result import Options, Row, against, median, p95, value_of
from bench.stages import Stages

SIZES = (100, 1_000, 10_000)
CHANGES = 30
APPLIED = 10
"""How many of the texts are also handed to the kernel: up to half a second each."""


class Answer(msgspec.Struct):
    """What the measuring process returns: each event's work, and the kernel's part of the first sync and of changes after."""

    events: dict[str, list[Work]]
    kernel: list[Applied]


def measure(options: Options, changes: int = CHANGES) -> list[Row]:
    """Measure all sizes, or the smallest of them (as baseline) and the stated one."""
    if not may_use_kernel():
        print("services-change: the kernel's part is left out, it needs root", file=sys.stderr)
    rows: list[Row] = []
    for mode in modes_here("services-change", options.modes):
        own: list[Row] = []
        for services in sizes(options.services):
            own += _rows(services, changes, mode, own)
        rows += own
    return rows


def sizes(stated: int | None) -> list[int]:
    """Return the numbers of Services to measure at, in ascending order."""
    return list(SIZES) if stated is None else sorted({min(stated, SIZES[0]), stated})


def _rows(services: int, changes: int, mode: str, before: Sequence[Row]) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory:
        params = {"directory": directory, "services": services, "changes": changes, "mode": mode}
        answer = in_fresh_process("bench.services_change:measure_here", params, Answer)
    rows: list[Row] = []
    for event, works in answer.events.items():
        figures: list[tuple[str, float, str]] = [
            ("work median", median([w.cpu for w in works]), "ms"),
            ("work p95", p95([w.cpu for w in works]), "ms"),
            ("elapsed median", median([w.wall for w in works]), "ms"),
            ("text size", median([len(w.text.encode()) for w in works]), "bytes"),
            ("text lines", median([w.text.count("\n") for w in works]), "lines"),
            ("written beside the text", median([w.elements for w in works]), "objects"),
            *((f"stage {s}", median([w.stages[s] for w in works]), "ms") for s in works[0].stages),
        ]
        rows += [Row(event, mode, {"services": services}, *figure) for figure in figures]
    if len(answer.kernel) > 1:
        took = median([a.wall for a in answer.kernel[1:]])
        elapsed = median([w.wall for w in answer.events["endpoint added"]])
        figures = [("kernel apply median", took, "ms"), ("from file to kernel median", elapsed + took, "ms")]
        rows += [Row("endpoint added", mode, {"services": services}, *figure) for figure in figures]
    return [_with_baseline(row, before) for row in rows]


def _with_baseline(row: Row, before: Sequence[Row]) -> Row:
    """Compare with the same figure at the smallest size; stages are too short for it."""
    smallest = min((int(r.params["services"]) for r in before), default=None)
    if smallest is None or row.metric.startswith("stage"):
        return row
    baseline = value_of(before, row.name, row.metric, services=smallest)
    return against(row, baseline, f"same at {smallest} services") if baseline else row


# -- in the measuring process ------------------------------------------------------------------------------------------


def measure_here(directory: str, services: int, changes: int, mode: str) -> Answer:
    """Make the cluster, sync once, then measure change after change, each to another Service and these spread over all."""
    path = Path(directory) / "objects"
    cluster.write_directory(path, services)
    count = min(changes, services)
    stages = Stages(mode)
    events: dict[str, list[Work]] = {}
    with place_for(mode):
        agent = MeasuredAgent(path, mode, stages)
        try:
            with stages.watching():
                first = agent.first()
                for event, change in EVENTS.items():
                    events[event] = []
                    for i in range(count):
                        change(path, i * services // count, services)
                        events[event].append(agent.follow())
        finally:
            agent.close()
    return Answer(events, _kernel_part(mode, [first, *events["endpoint added"]]))


def _kernel_part(mode: str, works: Sequence[Work]) -> list[Applied]:
    """Return what the kernel took for the first sync and for changes after it."""
    if not kernel_is_real(mode):
        return []
    return apply_in_turn([w.text for w in works[: APPLIED + 1]]) if mode == "iptables" else [w.kernel for w in works]


def _add_endpoint(path: Path, index: int, _: int) -> None:
    cluster.put(path, cluster.endpoint_slice(index, cluster.ENDPOINTS + 1))


def _add_service(path: Path, index: int, services: int) -> None:
    cluster.put(path, cluster.endpoint_slice(services + index))
    cluster.put(path, cluster.service(services + index))


def _remove_service(path: Path, index: int, services: int) -> None:
    for one in (cluster.service(services + index), cluster.endpoint_slice(services + index)):
        cluster.file_of(path, one).unlink()


EVENTS: dict[str, Callable[[Path, int, int], None]] = {
    "endpoint added": _add_endpoint,
    "service added": _add_service,
    "service removed": _remove_service,
}
"""What happens to the files for a Service's index among so many, in this order: the Services removed are those added before."""
