"""What a benchmark hands over: rows, in the form that scripts read, as a file and as a table for people.

    {"bench", "machine": {kernel, cpu, commit, command}, "rows": [{"name", "mode", "params": {}, "metric", "value", "unit",
     "baseline_ratio"}]}

``baseline_ratio`` is ``value`` divided by another value of the same run, which ``params["baseline"]`` names; null where a row has
none. Ratios within a run survive a busy or a slower machine; milliseconds do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec
from msgspec.structs import replace

Param: TypeAlias = int | float | str


class Options(msgspec.Struct, frozen=True):
    """What the command line asked for. ``services`` None: the benchmark's own sizes."""

    services: int | None = None
    modes: tuple[str, ...] = ("iptables",)
    """The one mode that was stated, or all there are."""

    @property
    def mode(self) -> str:
        """The mode of a benchmark that measures in one only."""
        return self.modes[0]


class Row(msgspec.Struct, frozen=True):
    """One measured value."""

    name: str
    mode: str
    params: dict[str, Param]
    metric: str
    value: float
    unit: str
    baseline_ratio: float | None = None


class Machine(msgspec.Struct, frozen=True):
    """Where it was measured, on which state of the tree, by which command."""

    kernel: str
    cpu: str
    commit: str
    command: str


class Result(msgspec.Struct, frozen=True):
    """One benchmark's run."""

    bench: str
    machine: Machine
    rows: list[Row]


def against(row: Row, baseline: float, words: str) -> Row:
    """Return a row with its ratio to ``baseline``, a value of the same unit and run that ``words`` name."""
    if baseline <= 0:
        return row
    return replace(row, params={**row.params, "baseline": words}, baseline_ratio=row.value / baseline)


def median(values: Sequence[float]) -> float:
    """Return the middle value, or the mean of the two middle ones."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def p95(values: Sequence[float]) -> float:
    """Return the smallest value that 95 of 100 do not exceed (nearest rank)."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def value_of(rows: Sequence[Row], name: str, metric: str, **params: Param) -> float | None:
    """Find the value of the row with that name, metric and params."""
    for row in rows:
        if (row.name, row.metric) == (name, metric) and params.items() <= row.params.items():
            return row.value
    return None


def write_result(result: Result, directory: Path) -> Path:
    """Write ``DIRECTORY/BENCH.json`` and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{result.bench}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    return path


def result_table(result: Result) -> str:
    """Return a run as a person reads it: the command, the machine, then aligned rows."""
    machine = result.machine
    cells = table_cells(result)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    rights = {3, 5}
    lines = [
        "  ".join(text.rjust(w) if i in rights else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    head = [f"$ {machine.command}", f"  {machine.cpu}, Linux {machine.kernel}, commit {machine.commit}"]
    return "\n".join([*head, *(f"  {line}".rstrip() for line in lines), ""])


def table_cells(result: Result) -> list[tuple[str, ...]]:
    """Return a run's rows as words for people, what each column is first."""
    return [("what", "at", "metric", "value", "unit", "ratio", "to"), *(_cells(row) for row in result.rows)]


def _cells(row: Row) -> tuple[str, ...]:
    at = ", ".join(f"{value} {key}" for key, value in row.params.items() if key != "baseline")
    ratio = "" if row.baseline_ratio is None else f"{row.baseline_ratio:.3g}"
    return (row.name, at, row.metric, number(row.value), row.unit, ratio, str(row.params.get("baseline", "")))


def number(value: float) -> str:
    """Print a value with three figures, and large ones with all of theirs."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
