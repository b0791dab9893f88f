"""Which file holds which object: decides which of two namesakes counts, and what a new version of a file changes.

    a.yaml   Service default/web  <- counts: the first path in alphabetical order
    b.yaml   Service default/web     stands as an error, and takes over when a.yaml no longer has it

Bad input takes nothing away: an object that can no longer be read keeps its last good version, a file that cannot be read at all
keeps all of its objects. Pure: reads no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from clusterstate.objects import EndpointSlice, KubernetesObject, ObjectRef, Service
from clusterstate.parse import Made, Parsed
from clusterstate.snapshot import Name, ObjectError, Snapshot, edited


class Holding(msgspec.Struct, frozen=True):
    """What one file holds, and what is wrong with it."""

    objects: Mapping[ObjectRef, Made] = {}
    errors: tuple[ObjectError, ...] = ()


NOTHING = Holding()


def held(parsed: Parsed, before: Holding) -> Holding:
    """Return what a file holds now, given what it held before: equal objects stay the same objects, bad ones their last good."""
    found = dict(parsed.made)
    errors: list[ObjectError] = []
    for error in parsed.errors:
        stays = not error.kept and error.ref is not None and error.ref not in found and error.ref in before.objects
        if stays and error.ref is not None:
            found[error.ref] = before.objects[error.ref]
        errors.append(replace(error, reason=f"{error.reason} (its last good version stays)") if stays else error)
    if any(error.ref is None for error in parsed.errors):
        # Something here cannot even be named: it may be any of those that are missing now.
        found |= {ref: made for ref, made in before.objects.items() if ref not in found}
    for ref, made in before.objects.items():
        if ref in found and found[ref] == made:
            found[ref] = made
    return Holding(found, tuple(errors))


class Difference(NamedTuple):
    """The objects that went and came in one step; a new version of one is in both."""

    gone: list[KubernetesObject]
    come: list[KubernetesObject]

    def refs(self) -> frozenset[ObjectRef]:
        """Return which objects differ."""
        return frozenset([one.ref for side in self for one in side])

    def services(self) -> frozenset[Name]:
        """Return the Services to compile again: those that differ, and those of which slices do."""
        found: set[Name] = set()
        for one in (*self.gone, *self.come):
            match one:
                case Service():
                    found.add((one.namespace, one.name))
                case EndpointSlice() if one.service:
                    found.add((one.namespace, one.service))
                case _:
                    pass
        return frozenset(found)


class Holdings:
    """What all files hold together, as one snapshot."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self._files: dict[str, Holding] = {}
        self._owners: dict[ObjectRef, tuple[str, ...]] = {}
        self._contested: set[ObjectRef] = set()
        self._faulty: set[str] = set()

    def of(self, path: str) -> Holding:
        """Return what a file holds, nothing for one not known."""
        return self._files.get(path, NOTHING)

    def below(self, directory: str, separator: str) -> list[str]:
        """Return the known files below a directory."""
        start = directory + separator if directory != "." else ""
        return [path for path in self._files if path.startswith(start)]

    def errors(self) -> tuple[ObjectError, ...]:
        """Return what is wrong now, sorted by file; costs the number of errors."""
        found = [error for path in self._faulty for error in self._files[path].errors]
        for ref in self._contested:
            winner, *losers = self._owners[ref]
            found += [ObjectError(path, ref, "", f"is also in {winner}, which counts") for path in losers]
        return tuple(sorted(found, key=lambda e: (e.source, e.ref or ObjectRef("", "", ""), e.field, e.reason)))

    def replace(self, files: Mapping[str, Holding | None]) -> Difference:
        """Take new versions of some files (None: the file is gone) and edit the snapshot (not its revision). Costs what differs."""
        if not self._owners:
            return self._first(files)
        refs: set[ObjectRef] = set()
        for path, new in files.items():
            refs.update(_differing(self.of(path).objects, (new or NOTHING).objects))
        before = {ref: self._made(ref) for ref in refs if ref in self._owners}
        for path, new in files.items():
            self._put(path, new)
        gone: list[KubernetesObject] = []
        come: list[KubernetesObject] = []
        for ref in refs:
            old, now = before.get(ref, ()), self._made(ref)
            gone += [one for one in old if one not in now]
            come += [one for one in now if one not in old]
        self.snapshot = edited(self.snapshot, gone, come)
        return Difference(gone, come)

    def _first(self, files: Mapping[str, Holding | None]) -> Difference:
        """Do what ``replace`` does where nothing was held: all that counts now has come, so there is nothing to compare."""
        for path, new in files.items():
            self._put(path, new)
        come = [one for ref, owners in self._owners.items() for one in self._files[owners[0]].objects[ref]]
        self.snapshot = edited(self.snapshot, (), come)
        return Difference([], come)

    def _made(self, ref: ObjectRef) -> Made:
        """Return the version of an object that counts."""
        owners = self._owners.get(ref)
        return self._files[owners[0]].objects[ref] if owners else ()

    def _put(self, path: str, new: Holding | None) -> None:
        old, now = self.of(path).objects, new.objects if new else {}
        for ref in old.keys() - now.keys() if old else ():
            self._own(ref, tuple([other for other in self._owners[ref] if other != path]))
        alone = (path,)
        if not self._owners:
            self._owners = dict.fromkeys(now, alone)  # the first file, often the only one
        else:
            for ref in now.keys() - old.keys() if old else now:
                others = self._owners.get(ref)
                self._own(ref, tuple(sorted((*others, path))) if others else alone)
        self._faulty.discard(path)
        if new is None:
            self._files.pop(path, None)
            return
        self._files[path] = new
        if new.errors:
            self._faulty.add(path)

    def _own(self, ref: ObjectRef, owners: tuple[str, ...]) -> None:
        """Note which files hold an object, the one that counts first."""
        if owners:
            self._owners[ref] = owners
        else:
            del self._owners[ref]
        if len(owners) > 1:
            self._contested.add(ref)
        elif self._contested:
            self._contested.discard(ref)


def _differing(old: Mapping[ObjectRef, Made], new: Mapping[ObjectRef, Made]) -> Iterable[ObjectRef]:
    """Return the refs of which two versions of a file hold different things."""
    if not old:
        return new
    return {ref for ref in old.keys() & new.keys() if old[ref] is not new[ref]} | (old.keys() ^ new.keys())
