"""Writing a plan that the kernel has refused: in steps, so that the refused chains end up alone and the rest goes through.

``iptables-restore`` commits each table whole or not at all, so one bad rule takes its table with it. Each table is therefore
written again in steps which all leave a table that makes sense:

    1. new chains, empty      a jump to a chain that stays empty falls through
    2. contents               the refused line names the chain; where the tool names none, by halves
    3. deletions              emptied first, so that their order does not matter

A refused chain keeps what it held. What then becomes of it is the reconciler's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from kernelstate.diff import Change, Delete, Edit, Plan, Replace
from kernelstate.errors import KernelRefusedError
from kernelstate.objects.netfilter import ChainKey

ATTEMPTS = 64
"""How many restores one containment may spend; what is left then fails with the last refusal."""

Unit = tuple[Change, ...]


def write_in_steps(plan: Plan, write: Callable[[Plan], None], attempts: int = ATTEMPTS) -> dict[ChainKey, str]:
    """Write as much of ``plan`` as the kernel takes; returns the refused chains with one line of reason each.

    ``write`` gets plans of one table, and raises KernelRefusedError without having changed anything or has done all of it.
    """
    steps = _Steps(write, attempts)
    for table in plan.tables:
        steps.table(plan.of_table(table))
    return steps.refused


class _Steps:
    def __init__(self, write: Callable[[Plan], None], attempts: int) -> None:
        self._write = write
        self._attempts = attempts
        self.refused: dict[ChainKey, str] = {}

    def table(self, plan: Plan) -> None:
        """Write one table's part of a plan, whole if the kernel takes it after all."""
        if self._try(plan) is None:
            return
        # In steps only whole chains are written: an edit counts on a state that a refusal in between would change.
        full = [change for change in plan.changes if isinstance(change, Replace | Edit)]
        deleted = [change for change in plan.changes if isinstance(change, Delete)]
        doors = [change for change in plan.changes if not isinstance(change, Replace | Edit | Delete)]
        self._units([(Replace(c.key, (), create=True),) for c in full if isinstance(c, Replace) and c.create])
        contents: list[Unit] = [(Replace(c.key, c.rules),) for c in full if c.key not in self.refused]
        contents += [tuple(group) for _, group in groupby(doors, key=lambda change: change.key)]
        self._units(contents)
        self._units([(Replace(change.key, ()),) for change in deleted])
        self._units([(change,) for change in deleted])

    def _try(self, plan: Plan) -> KernelRefusedError | None:
        self._attempts -= 1
        try:
            self._write(plan)
        except KernelRefusedError as error:
            return error
        return None

    def _units(self, units: Sequence[Unit]) -> None:
        """Write as many of the units as go; those that do not depend on each other's order may be given together."""
        if not units:
            return
        plan = Plan(tuple(change for unit in units for change in unit))
        error = self._try(plan)
        if error is None:
            return
        guilty = plan.change_at(error.line) if error.line else None
        if len(units) == 1 or error.line == 0 or self._attempts <= 0:
            self._refuse(units, error)
        elif guilty is not None:
            self._refuse([unit for unit in units if guilty in unit], error)
            self._units([unit for unit in units if guilty not in unit])
        else:
            self._units(units[: len(units) // 2])
            self._units(units[len(units) // 2 :])

    def _refuse(self, units: Sequence[Unit], error: KernelRefusedError) -> None:
        for unit in units:
            key = unit[0].key
            self.refused[key] = f"write IPv{key.family} {key.table} chain {key.name}: {error}"
