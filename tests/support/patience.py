"""Waiting for something, for a bounded time that a machine standing still does not use up.

    asked:  .  .  .  .              .  .  .
    clock:  ----------------------------------->   a virtual machine may be stopped for half a minute, with the clock going on
    counts: ---------|              |-------->     of such a gap a quarter of a second counts

Whatever was awaited had no time to happen during the gap either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
STEP = 0.25
"""Seconds: as much of the time between two looks at it counts at most."""
PAUSE = 0.02


class Patience:
    """So many seconds of waiting; ``over`` has to be looked at again and again."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._looked = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether they are used up."""
        now = time.monotonic()
        self._left -= min(now - self._looked, STEP)
        self._looked = now
        return self._left < 0


def until(condition: Callable[[], T], seconds: float) -> T | None:
    """Ask again and again; return the first answer that counts as true, None if there was none in time."""
    patience = Patience(seconds)
    while True:
        if found := condition():
            return found
        if patience.over:
            return None
        time.sleep(PAUSE)


def eventually(condition: Callable[[], T], seconds: float, what: str = "it did not come true") -> T:
    """Like ``until``, but fail if there was none in time."""
    found = until(condition, seconds)
    assert found, f"{what}: not within {seconds:g} s"
    return found
