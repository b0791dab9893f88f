"""Where the agent's time goes: CPU time of each stage, taken by standing in the doorway of the functions that begin one.

    read      source.load / poll      files to a snapshot
    compile   ServiceCompiler         snapshot to the table of meaning
    render    IptablesProgram         meaning to typed rules
    plan      FamilyFilter.plan       typed rules, against what the kernel holds, to changes
    print     Plan.text               changes to the text for iptables-restore
    other     all that is left        putting the parts together, bookkeeping

A stage is charged for itself only: what it calls that is a stage of its own is charged there. The doorways cost two clock readings
a call (about 1 us), and are taken down again afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from clusterstate.sources.files import FileSource
from kernelstate.diff import Plan
from kernelstate.reconcile_family import FamilyFilter
from proxy.compile import ServiceCompiler
from proxy.render.iptables_program import IptablesProgram

DOORS: tuple[tuple[type, str, str], ...] = (
    (FileSource, "load", "read"),
    (FileSource, "poll", "read"),
    (ServiceCompiler, "update", "compile"),
    (IptablesProgram, "update", "render"),
    (FamilyFilter, "plan", "plan"),
    (Plan, "text", "print"),
)
STAGES = ("read", "compile", "render", "plan", "print", "other")


class Stages:
    """Milliseconds of CPU time by stage, of everything since the last ``clear``."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._inner: list[float] = []

    def clear(self) -> None:
        """Begin again at zero."""
        self.spent.clear()

    def split(self, total: float) -> dict[str, float]:
        """Return every stage's share of a total in milliseconds; what no door was passed for is ``other``."""
        known = {stage: self.spent.get(stage, 0.0) for stage in STAGES if stage != "other"}
        return {**known, "other": max(0.0, total - sum(known.values()))}

    @contextmanager
    def watching(self) -> Iterator[Stages]:
        """Charge the stages' functions while the body runs."""
        with ExitStack() as undo:
            for owner, name, stage in DOORS:
                original = getattr(owner, name)
                setattr(owner, name, self._charged(original, stage))
                undo.callback(setattr, owner, name, original)
            yield self

    def _charged(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def charged(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = 1000 * (time.process_time() - started)
                own = spent - self._inner.pop()
                self.spent[stage] = self.spent.get(stage, 0.0) + own
                if self._inner:
                    self._inner[-1] += spent

        return charged
