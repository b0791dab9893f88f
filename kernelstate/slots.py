"""Room for pools in one long array: which slots are whose, and since when slots that were left may be used again.

    slots   0   1   2   3   4   5   6   7   8 ...          a pool of three has four slots: rooms come in powers of two,
            [ pool a    ]   [ b ]   .   [ c ] top          so what one leaves another fits into

A program may still be reading what a pool left a moment ago, so such room rests for a while. Pure: time is an argument.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

REST = 1.0
"""Seconds for which room that was left is not used; a program's run takes some microseconds."""


class NoRoomError(Exception):
    """The array is full, or so scattered that nothing of the size fits."""


def room_of(count: int) -> int:
    """Return how many slots so many endpoints take."""
    return 1 << (count - 1).bit_length()


class Slots:
    """An array of so many slots."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._top = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._resting: deque[tuple[float, int, int]] = deque()

    def take(self, count: int, now: float) -> int:
        """Return the first of at least ``count`` slots in a row. Raises NoRoomError."""
        while self._resting and self._resting[0][0] <= now:
            _, first, size = self._resting.popleft()
            self._free[size].append(first)
        size = room_of(count)
        if self._free[size]:
            return self._free[size].pop()
        if self._top + size > self.capacity:
            raise NoRoomError
        first, self._top = self._top, self._top + size
        return first

    def leave(self, first: int, count: int, now: float) -> None:
        """Give back what ``take`` gave."""
        self._resting.append((now + REST, first, room_of(count)))

    def occupy(self, rooms: Iterable[tuple[int, int]]) -> None:
        """Learn which rooms (first, count) are in use, of an array found in use. Raises NoRoomError if that cannot be."""
        for first, count in sorted(rooms):
            if first < self._top or first + room_of(count) > self.capacity:
                raise NoRoomError
            self._free_between(self._top, first)
            self._top = first + room_of(count)

    def _free_between(self, start: int, end: int) -> None:
        while start < end:
            size = 1 << ((end - start).bit_length() - 1)
            self._free[size].append(start)
            start += size
