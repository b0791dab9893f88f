"""What can be done to ipsets, how large they are made, and the names they bear while they grow.

    grow NAME:   create KUBE-TMP-...  ->  add all members  ->  swap names  ->  destroy KUBE-TMP-...
                                                               ^ rules that ask NAME see the new set from here on

A set's size limit is fixed when it is made. It gets room for twice what it holds, in powers of two and never less than 65,536, so
that a set is made anew about once for each doubling. Which set needs what is for ``reconcile_sets.py``.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from typing import NamedTuple, TypeAlias

import msgspec

from kernelstate.objects.sets import Member, SetSpec

TEMPORARY = "KUBE-TMP-"
"""Prefix of sets that exist only while another one grows."""
SMALLEST = 65536
BITMAP_PORTS = 65536


class SetHeader(msgspec.Struct, frozen=True):
    """What the kernel says of a set besides its members; ``references`` counts the rules that use it."""

    spec: SetSpec
    room: int
    elements: int
    references: int


class MemberChange(NamedTuple):
    """Members that one set is to gain and to lose. A set comes with its first member and goes with its last."""

    spec: SetSpec
    added: Collection[Member]
    removed: Collection[Member]


class CreateSet(NamedTuple):
    """Make an empty set with room for ``room`` members."""

    spec: SetSpec
    room: int

    def __str__(self) -> str:
        return f"create ipset {self.spec.name} {self.spec.type} family {self.spec.family} maxelem {self.room}"


class AddMembers(NamedTuple):
    """Add members; those there already are left."""

    spec: SetSpec
    members: Collection[Member]

    def __str__(self) -> str:
        return f"add {len(self.members)} members to ipset {self.spec.name}"


class DeleteMembers(NamedTuple):
    """Delete members; those gone already are fine."""

    spec: SetSpec
    members: Collection[Member]

    def __str__(self) -> str:
        return f"delete {len(self.members)} members from ipset {self.spec.name}"


class SwapSets(NamedTuple):
    """Exchange the names of two sets of one type and family: rules see the other's members from one packet to the next."""

    first: str
    second: str

    def __str__(self) -> str:
        return f"swap ipsets {self.first} and {self.second}"


class DestroySet(NamedTuple):
    """Destroy a set; refused as long as a rule refers to it."""

    name: str

    def __str__(self) -> str:
        return f"destroy ipset {self.name}"


SetChange: TypeAlias = CreateSet | AddMembers | DeleteMembers | SwapSets | DestroySet


def room_for(spec: SetSpec, members: int) -> int:
    """Return for how many members a set is made."""
    if spec.type == "bitmap:port":
        return BITMAP_PORTS
    room = SMALLEST
    while room < 2 * members:
        room *= 2
    return room


def temporary_name(name: str) -> str:
    """Return the name under which a set's successor is filled: fixed, so that one left behind is found."""
    return f"{TEMPORARY}{zlib.crc32(name.encode()):08X}"


def changes_to_make(spec: SetSpec, members: Collection[Member]) -> list[SetChange]:
    """Return what makes a set with its members where there is none."""
    made: list[SetChange] = [CreateSet(spec, room_for(spec, len(members)))]
    return [*made, AddMembers(spec, members)] if members else made


def changes_to_grow(spec: SetSpec, members: Collection[Member]) -> list[SetChange]:
    """Return what puts a larger set with all ``members`` in the place of one that got too small."""
    name = temporary_name(spec.name)
    left_behind = DestroySet(name)  # by an attempt that failed half-way
    return [left_behind, *changes_to_make(spec._replace(name=name), members), SwapSets(name, spec.name), DestroySet(name)]
