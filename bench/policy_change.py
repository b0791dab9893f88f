"""``policy-change``: what a change of policies, or of pods that are isolated, costs the agent, and what the kernel.

    pod started       a pod appears, with its address: it is isolated like its group, and a peer of ten other groups
    label changed     a pod moves from one group to another
    policy added      a policy appears that selects every pod and lets one group in
    policy removed    it goes (the source waits 50 ms for a deletion to be over; that is elapsed time, not work)

The cluster is *teams* of ``policies.py``: N pods and N policies; all pods are on the node that is measured, which is more than
any node has and the most that a policy can ask of it. Objects are JSON, one a file in one directory. *work* is the agent's CPU time from the
changed file to what is written, without the kernel; *kernel apply* is the elapsed time of the kernel, and of libnftables or iptables-restore
before it. What a change came to is counted twice: what the renderer said may differ, and what was written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from bench import policies
from bench.control import Work
from bench.fresh import in_fresh_process
from bench.kernel import may_use_kernel, own_namespace
from bench.policies import TEAM, labelled
from bench.policy_agent import DOORS, Counted, PolicyAgent
from bench.policy_layouts import layouts_here
from bench.result import Options, Row, against, median, value_of
from bench.stages import Stages
from kernelstate.linux import netns
from nodeplane.commands import Failed

SIZES = (100, 1_000)
CHANGES = 20
TARGETS = {"pod started": 50.0}
"""Milliseconds of work, at most."""


class Answer(msgspec.Struct):
    """What the measuring process returns: each event's work and what it came to."""

    first: Work
    events: dict[str, list[tuple[Work, Counted]]]


def measure(options: Options, changes: int = CHANGES, sizes: Sequence[int] = SIZES) -> list[Row]:
    """Measure both modes at every size. Raises Failed."""
    if not may_use_kernel():
        raise Failed("policy-change: an agent that writes to the kernel needs root")
    rows: list[Row] = []
    for mode in dict.fromkeys(layout.mode for layout in layouts_here("policy-change", options.modes)):
        own: list[Row] = []
        for size in sizes:
            own += _rows(size, changes, mode, own)
        rows += own
    return rows


def _rows(size: int, changes: int, mode: str, before: Sequence[Row]) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory:
        params = {"directory": directory, "size": size, "changes": changes, "mode": mode}
        answer = in_fresh_process("bench.policy_change:measure_here", params, Answer)
    rows = [
        Row("first sync", mode, {"pods": size}, "work median", answer.first.cpu, "ms"),
        Row("first sync", mode, {"pods": size}, "kernel apply median", answer.first.kernel.wall, "ms"),
    ]
    for event, steps in answer.events.items():
        works = [work for work, _ in steps]
        figures: list[tuple[str, float, str]] = [
            ("work median", median([w.cpu for w in works]), "ms"),
            ("kernel apply median", median([w.kernel.wall for w in works]), "ms"),
            ("kernel apply CPU median", median([w.kernel.cpu for w in works]), "ms"),
            ("chains that may differ", median([c.chains for _, c in steps]), "chains"),
            ("sets that may differ", median([c.sets for _, c in steps]), "sets"),
            ("elements that may differ", median([c.elements for _, c in steps]), "elements"),
            ("text lines", median([w.text.count("\n") for w in works]), "lines"),
            ("written beside the text", median([w.elements for w in works]), "objects"),
            *((f"stage {s}", median([w.stages[s] for w in works]), "ms") for s in works[0].stages),
        ]
        rows += [Row(event, mode, {"pods": size}, *figure) for figure in figures]
    return [_with_target(_with_baseline(row, before)) for row in rows]


def _with_baseline(row: Row, before: Sequence[Row]) -> Row:
    """Compare with the same figure at the smallest size; stages are too short for it."""
    smallest = min((int(r.params["pods"]) for r in before), default=None)
    if smallest is None or row.metric.startswith("stage"):
        return row
    baseline = value_of(before, row.name, row.metric, pods=smallest)
    return against(row, baseline, f"same at {smallest} pods") if baseline else row


def _with_target(row: Row) -> Row:
    if row.metric != "work median" or row.name not in TARGETS:
        return row
    return replace(row, params={**row.params, "at most": TARGETS[row.name]})


# -- in the measuring process ------------------------------------------------------------------------------------------


def measure_here(directory: str, size: int, changes: int, mode: str) -> Answer:
    """Make the cluster, sync once, then measure change after change, each of another pod and these spread over all."""
    path = Path(directory) / "objects"
    path.mkdir()
    for one in policies.teams(size):
        policies.put(path, one)
    stages = Stages(DOORS[mode])
    events: dict[str, list[tuple[Work, Counted]]] = {event: [] for event in EVENTS}
    with own_namespace() as name, netns.inside(name):
        agent = PolicyAgent(path, mode, stages)
        try:
            with stages.watching():
                first = agent.first()
                for names in (("pod started",), ("label changed",), ("policy added", "policy removed")):
                    for i in range(min(changes, size)):
                        for event in names:
                            EVENTS[event](path, i * size // min(changes, size), size)
                            work, counted = agent.change()
                            events[event].append((work, counted))
        finally:
            agent.close()
    return Answer(replace(first, text=""), events)


def _start_pod(path: Path, index: int, size: int) -> None:
    policies.put(path, policies.team_pod(size + index, index // TEAM))


def _change_label(path: Path, index: int, size: int) -> None:
    groups = size // TEAM
    policies.put(path, policies.team_pod(index, (index // TEAM + groups // 2) % groups))


def _add_policy(path: Path, _index: int, _size: int) -> None:
    policies.put(path, policies.policy("for-all", {"tier": "inner"}, [labelled(team="team-000")]))


def _remove_policy(path: Path, _index: int, _size: int) -> None:
    (path / "networkpolicy_for-all.json").unlink()


EVENTS: dict[str, Callable[[Path, int, int], None]] = {
    "pod started": _start_pod,
    "label changed": _change_label,
    "policy added": _add_policy,
    "policy removed": _remove_policy,
}
"""What happens to the files, for a pod's number among so many."""
