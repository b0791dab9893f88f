"""Counters, gauges and histograms, and how Prometheus reads them (text format 0.0.4).

Observing takes a lock for some nanoseconds; printing copies the numbers under the same lock and formats them without it, so whoever
scrapes holds nobody up. Which metrics there are is for ``metrics.py``. Why not prometheus_client: 75 ms and 9.6 MB at every start of an
agent, for these hundred lines. Source: Prometheus exposition formats.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[str, ...]
"""Values, in the order in which the metric names its labels."""


class Registry:
    """Metrics that are printed together, in the order in which they were made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._families: list[_Family] = []

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Numbers:
        """Make a number that only grows."""
        return self._add(Numbers(self._lock, "counter", name, text, labels))

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Numbers:
        """Make a number that is set."""
        return self._add(Numbers(self._lock, "gauge", name, text, labels))

    def histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        """Make a distribution; ``buckets`` are upper bounds, ascending, infinity left out."""
        made = Histogram(self._lock, name, text, buckets, labels)
        self._families.append(made)
        return made

    def _add(self, made: Numbers) -> Numbers:
        self._families.append(made)
        return made

    def print(self) -> bytes:
        """Return all of them as text."""
        with self._lock:
            copies = [(family, family.copy()) for family in self._families]
        lines: list[str] = []
        for family, samples in copies:
            if samples:
                lines += [f"# HELP {family.name} {_help(family.text)}", f"# TYPE {family.name} {family.kind}"]
                lines += family.lines(samples)
        return ("\n".join(lines) + "\n").encode() if lines else b""


class _Family:
    """A metric with all combinations of its labels."""

    def __init__(self, lock: threading.Lock, kind: str, name: str, text: str, labels: Sequence[str]) -> None:
        self._lock = lock
        self.kind, self.name, self.text, self.labels = kind, name, text, tuple(labels)

    def copy(self) -> Mapping[Labels, Sequence[float]]:
        """Return the numbers as they are; to be called with the lock held."""
        raise NotImplementedError

    def lines(self, samples: Mapping[Labels, Sequence[float]]) -> Iterable[str]:
        """Print such a copy."""
        raise NotImplementedError


class Numbers(_Family):
    """A counter or a gauge."""

    def __init__(
        self, lock: threading.Lock, kind: Literal["counter", "gauge"], name: str, text: str, labels: Sequence[str]
    ) -> None:
        super().__init__(lock, kind, name, text, labels)
        self._values: dict[Labels, float] = {}
        if not labels:
            self._values[()] = 0.0

    def add(self, *labels: str, by: float = 1.0) -> None:
        """Count."""
        with self._lock:
            self._values[labels] = self._values.get(labels, 0.0) + by

    def set(self, value: float, *labels: str) -> None:
        """Say what it is now."""
        with self._lock:
            self._values[labels] = float(value)

    def replace(self, values: Mapping[Labels, float]) -> None:
        """Say what all of it is now: combinations of labels that are not in ``values`` are gone."""
        with self._lock:
            self._values = dict(values)

    def copy(self) -> Mapping[Labels, Sequence[float]]:
        """Return the numbers as they are."""
        return {labels: (value,) for labels, value in self._values.items()}

    def lines(self, samples: Mapping[Labels, Sequence[float]]) -> Iterable[str]:
        """Print one line each."""
        return [f"{self.name}{_labels(self.labels, labels)} {_number(samples[labels][0])}" for labels in sorted(samples)]


class Histogram(_Family):
    """How often a value was at most each of some bounds."""

    def __init__(self, lock: threading.Lock, name: str, text: str, buckets: Sequence[float], labels: Sequence[str]) -> None:
        super().__init__(lock, "histogram", name, text, labels)
        self._bounds = tuple(buckets)
        self._values: dict[Labels, list[float]] = {}
        """For each bound how many values it is the first for, then how many were larger, then their sum."""

    def observe(self, value: float, *labels: str) -> None:
        """Take in one value."""
        place = next((i for i, bound in enumerate(self._bounds) if value <= bound), len(self._bounds))
        with self._lock:
            held = self._values.setdefault(labels, [0.0] * (len(self._bounds) + 2))
            held[place] += 1
            held[-1] += value

    def copy(self) -> Mapping[Labels, Sequence[float]]:
        """Return the numbers as they are."""
        return {labels: tuple(held) for labels, held in self._values.items()}

    def lines(self, samples: Mapping[Labels, Sequence[float]]) -> Iterable[str]:
        """Print the buckets, each with all before it, then sum and count."""
        names = (*self.labels, "le")
        for labels in sorted(samples):
            *counts, total = samples[labels]
            so_far = 0.0
            for bound, count in zip((*map(_number, self._bounds), "+Inf"), counts, strict=True):
                so_far += count
                yield f"{self.name}_bucket{_labels(names, (*labels, bound))} {_number(so_far)}"
            plain = _labels(self.labels, labels)
            yield f"{self.name}_sum{plain} {_number(total)}"
            yield f"{self.name}_count{plain} {_number(so_far)}"


def _labels(names: Sequence[str], values: Labels) -> str:
    pairs = ",".join(f'{name}="{_value(value)}"' for name, value in zip(names, values, strict=True))
    return f"{{{pairs}}}" if pairs else ""


def _value(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
