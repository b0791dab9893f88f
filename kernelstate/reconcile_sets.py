"""Keeps ipsets as desired: remembers their members, writes the difference, lets them grow, destroys what no rule uses.

      1  missing sets are made and filled, members added, then deleted     before the rules that ask them
      2  rules change                                                      (somebody else's business)
      3  sets that are not wanted are destroyed                            once no rule refers to them

So a set that goes is usually still referred to when ``sync`` comes to it. That is no failure: ``drifted`` says yes as soon as its
last reference is gone, and the ``sync`` after that destroys it; one right after the rules were written does at once.

ipset tells of no change. ``drifted`` lists headers, which costs about a quarter of a millisecond whatever the sets hold: type,
room and number of members are compared. A member exchanged for another is seen when ``forget`` was called. What may be done to
sets, and how large they are made, is for ``diff_sets.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from kernelstate.diff_sets import (
    AddMembers,
    DeleteMembers,
    DestroySet,
    MemberChange,
    SetChange,
    SetHeader,
    changes_to_grow,
    changes_to_make,
    room_for,
)
from kernelstate.errors import KernelStateError
from kernelstate.objects.sets import IpSet, IpSets, Member, SetSpec
from kernelstate.ownership import Ownership
from kernelstate.ports import SyncReport


class IpsetPort(Protocol):
    """Reading and writing ipsets in the current network namespace. Everything may raise KernelStateError."""

    def headers(self) -> dict[str, SetHeader]:
        """Return every set, whoever made it, without its members."""

    def members(self, spec: SetSpec) -> frozenset[Member]:
        """Return a set's members."""

    def apply(self, changes: Sequence[SetChange]) -> str:
        """Do each, in order, until one is refused; return that one and the kernel's words, empty if all are done.

        Adding what is there and deleting what is gone are success.
        """


class _Set:
    """One set: what it shall hold, and how the kernel's differs, so that a change costs its own size.

    ``wanted`` None: it is to go. ``found`` None: the kernel has none. ``listed``: whether the two differences are known.
    """

    __slots__ = ("found", "listed", "members", "missing", "surplus", "wanted")

    def __init__(self) -> None:
        self.wanted: SetSpec | None = None
        self.members: set[Member] = set()
        self.found: SetHeader | None = None
        self.listed = False
        self.missing: set[Member] = set()
        self.surplus: set[Member] = set()

    def add(self, member: Member) -> None:
        if member not in self.members:
            self.members.add(member)
            if member in self.surplus:
                self.surplus.discard(member)
            else:
                self.missing.add(member)

    def remove(self, member: Member) -> None:
        if member in self.members:
            self.members.discard(member)
            if member in self.missing:
                self.missing.discard(member)
            else:
                self.surplus.add(member)

    def compare(self, seen: AbstractSet[Member]) -> None:
        """Take in what the kernel's set holds."""
        self.missing, self.surplus, self.listed = self.members - seen, set(seen - self.members), True

    def written(self, room: int) -> None:
        """Remember that the kernel's set is as wanted."""
        assert self.wanted is not None
        self.found = SetHeader(self.wanted, room, len(self.members), 0)
        self.missing, self.surplus, self.listed = set(), set(), True

    @property
    def is_settled(self) -> bool:
        return self.found is not None and self.listed and not self.missing and not self.surplus

    def is_as(self, header: SetHeader | None) -> bool:
        """Whether a header is as remembered; a number of members that the kernel does not tell is not compared."""
        if header is None or self.found is None or not self.listed:
            return header is self.found is None
        held = len(self.members) - len(self.missing) + len(self.surplus)
        return (header.spec, header.room) == (self.found.spec, self.found.room) and header.elements in {-1, held}


class IpsetReconciler:
    """The sets of one network namespace; implements ``ports.Reconciler``. Not safe for several threads at once.

    ``ownership`` says by its name which set is ours; it should own ``diff_sets.TEMPORARY`` as well.
    """

    def __init__(self, port: IpsetPort, ownership: Ownership, part: str = "ipset") -> None:
        self.part = part
        self._port, self._ownership = port, ownership
        self._sets: dict[str, _Set] = {}
        """Wanted ones, and those of ours in the kernel that are not wanted."""
        self._is_told = self._has_looked = False
        self._candidates: set[str] = set()
        """Names of sets that may differ."""
        self._suspect: set[str] = set()
        """What has to be looked up before it is compared."""
        self._errors: dict[str, str] = {}

    def set_desired(self, sets: IpSets, changed: Collection[str] | None = None) -> None:
        """Say what shall exist from now on; nothing is written before ``sync``.

        ``changed`` names every set that differs from what was handed over before, None means any may. Costs the size of these
        sets; ``adjust`` costs that of the change.
        """
        for name in {*sets, *self._sets} if changed is None or not self._is_told else changed:
            self._want(name, sets.get(name))
        self._is_told = True

    def adjust(self, changes: Iterable[MemberChange]) -> None:
        """Say what differs from what was handed over before: a set is wanted as long as it has members."""
        for spec, added, removed in changes:
            known = self._sets.setdefault(spec.name, _Set())
            for member in removed:
                known.remove(member)
            for member in added:
                known.add(member)
            if not known.members:
                self._want(spec.name, None)
            elif known.wanted is None:
                known.wanted = spec
            self._candidates.add(spec.name)

    def _want(self, name: str, want: IpSet | None) -> None:
        known = self._sets.setdefault(name, _Set())
        if want is None:
            known.wanted, known.listed = None, False
            known.members, known.missing, known.surplus = set(), set(), set()
        else:
            known.wanted = want.spec
            for member in known.members - want.members:
                known.remove(member)
            for member in want.members - known.members:
                known.add(member)
        self._candidates.add(name)

    def exchange(self, changes: Iterable[MemberChange]) -> None:
        """Say which members come and go in sets that are wanted whether they have any or not."""
        for spec, added, removed in changes:
            known = self._sets[spec.name]
            for member in removed:
                known.remove(member)
            for member in added:
                known.add(member)
            self._candidates.add(spec.name)

    @property
    def dirty(self) -> bool:
        """Whether something desired is known not to be in the kernel yet. A set that waits for its rules to go does not count."""
        return self._is_told and bool(not self._has_looked or self._candidates or self._suspect or self._errors)

    def forget(self) -> None:
        """Trust no memory: the next ``sync`` observes everything."""
        self._has_looked = False

    def drifted(self) -> bool:
        """Compare headers, members uncounted; also says yes when a set that is not wanted lost its last reference."""
        if not self._is_told:
            return False
        if self._has_looked:
            try:
                headers = self._port.headers()
            except KernelStateError:
                self.forget()
                return True
            pending = self._candidates | self._errors.keys()
            for name, known in self._sets.items():
                if known.wanted is not None and name not in pending and not known.is_as(headers.get(name)):
                    self._suspect.add(name)
            self._suspect |= {n for n in headers if n not in self._sets and self._ownership.owns(n)}
            if any(headers[n].references == 0 for n in self._unwanted() if n in headers):
                return True
        return not self._has_looked or bool(self._suspect)

    def sync(self) -> SyncReport:
        """Write what differs. The first sync, and one after ``forget``, observes first."""
        if not self._is_told:
            return SyncReport(self.part)
        done = 0
        try:
            if not self._has_looked:
                self._observe()
            done = self._settle()
            done += self._destroy()
        except KernelStateError as error:
            self.forget()
            return SyncReport(self.part, done, (str(error),))
        return SyncReport(self.part, done, tuple(self._errors[name] for name in sorted(self._errors)))

    def cleanup(self) -> SyncReport:
        """Destroy every set of ours; those that rules still refer to are told as errors."""
        refused: list[str] = []
        done = 0
        try:
            for name in sorted(filter(self._ownership.owns, self._port.headers())):
                words = self._port.apply([DestroySet(name)])
                refused += [words] if words else []
                done += not words
        except KernelStateError as error:
            refused.append(str(error))
        self.forget()
        return SyncReport(self.part, done, tuple(refused))

    # -- looking -----------------------------------------------------------------------------------------------------

    def _observe(self) -> None:
        headers = self._port.headers()
        ours = {name for name in headers if self._ownership.owns(name)}
        self._look_up(ours | self._sets.keys(), headers)
        self._candidates, self._has_looked = set(self._sets), True
        self._suspect.clear()

    def _look_up(self, names: Iterable[str], headers: Mapping[str, SetHeader]) -> None:
        """Replace memory of some sets; members matter only of one that is wanted and of the wanted type."""
        for name in names:
            known = self._sets.setdefault(name, _Set())
            known.found, known.listed = headers.get(name), False
            if known.found is not None and known.wanted == known.found.spec:
                known.compare(self._port.members(known.wanted))

    def _unwanted(self) -> list[str]:
        return sorted(name for name, known in self._sets.items() if known.wanted is None)

    # -- writing -----------------------------------------------------------------------------------------------------

    def _settle(self) -> int:
        """Compare and write; what is refused is looked up and tried once more, and then told."""
        suspect = self._suspect | self._errors.keys()
        if suspect:
            self._suspect = set(suspect)  # stays so if the look fails
            self._look_up(suspect, self._port.headers())
        self._candidates |= suspect
        self._suspect, self._errors = set(), {}
        done = 0
        for name in sorted(self._candidates):
            known = self._sets[name]
            if known.wanted is None or known.is_settled:
                continue
            count, words = self._bring(known)
            if words:
                self._look_up([name], self._port.headers())
                count, words = self._bring(known)
                self._errors.update({name: words} if words else {})
            done += count
        self._candidates = set()
        return done

    def _bring(self, known: _Set) -> tuple[int, str]:
        """Write what differs of one set; return the number of changes and, if one was refused, the words."""
        assert known.wanted is not None
        if known.found is not None and known.found.spec == known.wanted and not known.listed:
            known.compare(self._port.members(known.wanted))
        changes, room = _changes_of(known.wanted, known)
        words = self._port.apply(changes) if changes else ""
        if words:
            return 0, words
        known.written(room)
        return sum(len(c.members) if isinstance(c, AddMembers | DeleteMembers) else 1 for c in changes), ""

    def _destroy(self) -> int:
        """Destroy what is not wanted and no rule refers to; the rest waits."""
        names = self._unwanted()
        if not names:
            return 0
        headers = self._port.headers()
        done = 0
        for name in names:
            header = headers.get(name)
            if header is not None and (header.references or self._port.apply([DestroySet(name)])):
                self._sets[name].found = header
                continue
            del self._sets[name]
            done += header is not None
        return done


def _changes_of(spec: SetSpec, known: _Set) -> tuple[list[SetChange], int]:
    """Return what turns the kernel's set into what is wanted, and the room it then has."""
    room = room_for(spec, len(known.members))
    if known.found is None:
        return changes_to_make(spec, known.members), room
    if known.found.spec != spec:
        return [DestroySet(spec.name), *changes_to_make(spec, known.members)], room
    if len(known.members) + len(known.surplus) > known.found.room:  # all are there for a moment
        return changes_to_grow(spec, known.members), room
    changes: list[SetChange] = [AddMembers(spec, known.missing)] if known.missing else []
    return changes + ([DeleteMembers(spec, known.surplus)] if known.surplus else []), known.found.room
