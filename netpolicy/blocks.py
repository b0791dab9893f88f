"""Address blocks with exceptions as intervals: what of a rule's peers is stated in numbers.

    10.0.0.0/8 except 10.1.0.0/16, and 10.1.2.0/24  -->  10.0.0.0-10.0.255.255  10.1.2.0-10.1.2.255  10.2.0.0-10.255.255.255

An exception takes from its own block only, so each block is cut by itself before they are joined. The result is sorted, and its
intervals neither overlap nor touch: sets of nftables refuse those that do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from clusterstate.objects import IPBlock, IPNetwork
from kernelstate.objects.address import BITS, Family


class Interval(NamedTuple):
    """Addresses as numbers, both ends included."""

    family: Family
    first: int
    last: int


def intervals(blocks: Iterable[IPBlock]) -> tuple[Interval, ...]:
    """Return what the blocks hold together, IPv4 first."""
    return joined(part for block in blocks for part in _cut(block))


def joined(parts: Iterable[Interval]) -> tuple[Interval, ...]:
    """Return the union of intervals, sorted, with no two that overlap or touch."""
    found: list[Interval] = []
    for part in sorted(parts):
        before = found[-1] if found else None
        if before is not None and before.family == part.family and part.first <= before.last + 1:
            found[-1] = Interval(part.family, before.first, max(before.last, part.last))
        else:
            found.append(part)
    return tuple(found)


def prefixes(part: Interval) -> list[tuple[int, int]]:
    """Return an interval as networks, each an address and a length, which is never 0: what is everything is two halves."""
    found: list[tuple[int, int]] = []
    bits, position = BITS[part.family], part.first
    while position <= part.last:
        free = (position & -position).bit_length() - 1 if position else bits - 1
        size = min(free, bits - 1, (part.last - position + 1).bit_length() - 1)
        found.append((position, bits - size))
        position += 1 << size
    return found


def _cut(block: IPBlock) -> list[Interval]:
    """Return a block without its exceptions."""
    whole, rest = _span(block.cidr), []
    position = whole.first
    for hole in joined(_span(part) for part in block.excepts):
        if position < hole.first:
            rest.append(Interval(whole.family, position, hole.first - 1))
        position = hole.last + 1
    if position <= whole.last:
        rest.append(Interval(whole.family, position, whole.last))
    return rest


def _span(network: IPNetwork) -> Interval:
    return Interval(4 if network.version == 4 else 6, int(network.network_address), int(network.broadcast_address))
