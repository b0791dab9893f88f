"""Objects from files and directories, followed as they change.

    load()   everything, once                                     -> Update(changed=None)
    fileno() becomes readable when something happened
    poll()   what happened since, as one whole new snapshot       -> Update, or None where nothing differs

Decides what a change of a *file* means for its *objects*:

    written, renamed over      read again; objects that compare equal have not changed
    deleted                    its objects are gone
    unreadable, half-written   an error; its objects stay (``holdings.py``)
    its directory is gone      an error; the objects of all files in it stay until it is back
    ``.generation`` written    everything that happened before it is in the update that echoes it

A tree is deleted or made in many steps, so after a deletion or a new directory ``poll`` waits until nothing more happens for some
milliseconds (``SETTLE``), in order not to take half a deleted directory for deleted files. A writer that ends with
``.generation`` is not waited for.
"""

# Paths are keys of dictionaries here, compared and cut as text, thousands at a time.
# ruff: noqa: PTH110, PTH112, PTH114, PTH116, PTH118, PTH120

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from clusterstate.snapshot import ObjectError, Snapshot, Update
from clusterstate.sources.holdings import NOTHING, Difference, Holding, Holdings
from clusterstate.sources.tree import SourceError, gc_paused, read_file, require, walk, whole
from clusterstate.sources.watch import GENERATION, Seen, Watch

SETTLE = 0.05
"""Seconds of quiet after which a deletion is taken for complete."""
LONGEST_SETTLE = 1.0
DOUBT = 5
"""Milliseconds to wait for news of a file that holds less than before: cut short by a writer this moment, its event is on the way."""
BROKEN = 100
"""The same for a file that is empty or breaks off: on a busy machine its writer may have been stopped in the middle."""
EMPTIED = 500
"""Milliseconds: so long a disk may take to cut a file, which is what opening it for writing does, before anybody is told."""
ROUNDS = 50
"""How often one ``poll`` looks for more before it hands over what it has; the rest stays for the next."""


class FileSource:
    """Follows the objects in files and directories. Use from one thread; ``close`` when done."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._roots = tuple(dict.fromkeys(os.path.normpath(path) for path in paths))
        self._watch = Watch(self._roots)
        self._holdings = Holdings()
        self._lost: dict[str, ObjectError] = {}
        self._generations: dict[str, str] = {}
        self._revision = 0
        self._unread: set[str] = set()
        """Files that were written, and are being written again before they could be read."""
        self._told: tuple[ObjectError, ...] = ()
        self._said = ""

    def fileno(self) -> int:
        """Return a descriptor for select or epoll."""
        return self._watch.fileno()

    def close(self) -> None:
        """Stop following."""
        self._watch.close()

    # -- the first read ----------------------------------------------------------------------------------------------

    def load(self) -> Update:
        """Read everything. Raises SourceError where a given path is missing."""
        files: dict[str, Holding | None] = {}
        for root in self._roots:
            require(root)
            try:
                self._watch.anchor(root)
                if os.path.isdir(root):
                    self._watch.add_directory(root)  # before anything is read: what is written meanwhile is then news
                self._read_generation(root)  # before the files: what it numbers must be among them
                found = self._list(root) if os.path.isdir(root) else [root]
            except OSError as error:
                raise SourceError(f"{root}: cannot be watched: {error.strerror or error}") from error
            with gc_paused():
                files |= {path: holding for path in found if (holding := self._read(path)) is not None}
        with gc_paused():
            self._holdings.replace(files)
        return self._update(None, self._errors(), self._generation())

    def _list(self, directory: str) -> list[str]:
        """Watch a directory and all below it, and return the files of objects in it. Raises OSError for the topmost only."""
        return list(walk(directory, self._watch.add_directory, self._lose))

    # -- following ---------------------------------------------------------------------------------------------------

    def poll(self) -> Update | None:
        """Take in what happened, as far as it is there. Returns None where nothing differs.

        Each round drains, then reads; a file that is found being written *after* it was read is left as it was, and a
        ``.generation`` counts only once a drain behind its reading came back empty and no file is left unread: then all that
        preceded it has been read.
        """
        files: dict[str, Holding | None] = {}
        for _ in range(ROUNDS):
            seen = Seen()
            if not self._watch.drain(seen) and not self._has_more_to_come(files):
                break
            if seen.unsettled:
                self._settle(seen)
            for path in files.keys() & self._watch.writing:
                del files[path]
                self._unread.add(path)
            if seen:
                self._take_in(seen, files)
        else:
            return self._hand_over(files, self._said)
        return self._hand_over(files, self._said if self._unread else self._generation())

    def _has_more_to_come(self, files: Mapping[str, Holding | None]) -> bool:
        """Tell whether something happens to a file that was read empty: it may be so for a while before inotify says who empties it."""
        is_empty = any(holding is not None and holding.errors and _size(path) == 0 for path, holding in files.items())
        return is_empty and self._watch.wait(EMPTIED)

    def _settle(self, seen: Seen) -> None:
        """Wait for the end of a deletion, unless its writer has declared it complete."""
        until = time.monotonic() + LONGEST_SETTLE
        while not seen.generation and time.monotonic() < until and self._watch.wait(int(SETTLE * 1000)):
            self._watch.drain(seen)

    def _take_in(self, seen: Seen, files: dict[str, Holding | None]) -> None:
        """Read what was touched into ``files``."""
        if seen.generation:
            for root in self._roots:
                self._read_generation(root)
        touched = set(seen.files)
        for root in self._roots if seen.overflow else sorted(seen.roots):
            touched |= self._look_at_root(root)
        for directory in sorted(seen.directories):
            if directory in seen.renamed and not os.path.isdir(directory):
                touched -= self._renamed(directory, touched)
                files |= dict.fromkeys(self._holdings.below(directory, os.sep))
            elif not os.path.islink(directory):
                touched |= self._look_at(directory)
        self._unread = (self._unread | touched) & self._watch.writing
        patience = 0
        for path in sorted(touched - self._unread):
            if not os.path.lexists(path):
                if not self._is_lost(path):
                    files[path] = None
                continue
            self._lost.pop(path, None)
            holding = self._read(path)
            if holding is not None:
                files[path] = holding
                if any(error.ref is None for error in holding.errors):
                    patience = max(patience, BROKEN)
                elif holding.errors or not holding.objects.keys() >= self._holdings.of(path).objects.keys():
                    patience = max(patience, DOUBT)
        if patience:
            self._watch.wait(patience)

    def _look_at_root(self, root: str) -> set[str]:
        """Look whether a given path has come or gone. Returns the files to read."""
        try:
            self._watch.anchor(root)
        except OSError as error:
            self._lose(root, f"cannot be watched: {error.strerror or error}")
            return set()
        if not os.path.exists(root):
            self._gone(root)
            return set()
        if os.path.isdir(root):
            self._read_generation(root)
            return self._look_at(root)
        return {root, *self._holdings.below(root, os.sep)}

    def _look_at(self, directory: str) -> set[str]:
        """List a directory that came, went or was swapped. Returns the files to read, those known before among them."""
        self._watch.forget(directory)
        if not os.path.isdir(directory):
            self._is_lost(os.path.join(directory, ""))
            return set()
        self._found_again(directory)
        try:
            found = self._list(directory)
        except OSError as error:
            self._lose(directory, f"cannot be listed: {error.strerror}")
            return set()
        return {*found, *self._holdings.below(directory, os.sep)}

    def _renamed(self, directory: str, touched: set[str]) -> set[str]:
        """Forget a directory that has another name now. Returns which of the touched files were in it."""
        self._watch.forget(directory)
        self._found_again(directory)
        return {path for path in touched if path.startswith(directory + os.sep)}

    def _is_lost(self, path: str) -> bool:
        """Tell whether a missing file lies in a missing directory (or is a given path), and note the topmost of those."""
        if path in self._roots:
            self._gone(path)
            return True
        top, above = "", os.path.dirname(path)
        roots = [root for root in self._roots if path.startswith(root + os.sep) or root == "."]
        while above and not os.path.isdir(above):
            top, above = above, "" if above in roots else os.path.dirname(above)
        if not top:
            return False
        if top in self._roots or self._holdings.below(top, os.sep):
            self._gone(top)
        return True

    def _found_again(self, directory: str) -> None:
        for lost in [path for path in self._lost if path == directory or path.startswith(directory + os.sep)]:
            del self._lost[lost]

    def _gone(self, path: str) -> None:
        hint = " (an empty directory takes it away)" if self._holdings.of(path) is NOTHING else ""
        self._lose(path, f"is gone; what it held stays until it is back{hint}")

    def _lose(self, path: str, reason: str) -> None:
        self._lost[path] = whole(path, reason)

    # -- reading -----------------------------------------------------------------------------------------------------

    def _read(self, path: str) -> Holding | None:
        return read_file(path, path in self._roots, self._holdings.of(path))

    def _read_generation(self, root: str) -> None:
        """Read the number a writer gave to this state, from a given directory."""
        try:
            self._generations[root] = Path(root, GENERATION).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            self._generations.pop(root, None)

    # -- handing over ------------------------------------------------------------------------------------------------

    def _hand_over(self, files: dict[str, Holding | None], generation: str) -> Update | None:
        change = self._holdings.replace(files) if files else Difference([], [])
        errors = self._errors()
        if not any(change) and errors == self._told and generation == self._said:
            return None
        return self._update(change, errors, generation)

    def _update(self, change: Difference | None, errors: tuple[ObjectError, ...], generation: str) -> Update:
        self._revision += 1
        self._told, self._said = errors, generation
        return Update(
            snapshot=replace(self._holdings.snapshot, revision=self._revision),
            changed=None if change is None else change.refs(),
            errors=errors,
            service_changed=None if change is None else change.services(),
            generation=generation,
        )

    def _errors(self) -> tuple[ObjectError, ...]:
        return (*self._holdings.errors(), *(self._lost[path] for path in sorted(self._lost)))

    def _generation(self) -> str:
        """Return what the ``.generation`` files say, in the order of the given paths."""
        return ",".join(self._generations[root] for root in self._roots if root in self._generations)


def load_objects(paths: Sequence[Path]) -> tuple[Snapshot, tuple[ObjectError, ...]]:
    """Read files and directories once, without following them. Raises SourceError where a given path is missing."""
    holdings = Holdings()
    files: dict[str, Holding | None] = {}
    unlisted: list[ObjectError] = []
    for root in dict.fromkeys(os.path.normpath(path) for path in paths):
        require(root)
        found: tuple[str, ...] = (root,)
        if os.path.isdir(root):
            try:
                found = tuple(walk(root, lambda _: None, lambda path, reason: unlisted.append(whole(path, reason))))
            except OSError as error:
                raise SourceError(f"{root}: cannot be listed: {error.strerror}") from error
        with gc_paused():
            files |= {path: read_file(path, path == root, NOTHING) for path in found}
    with gc_paused():
        holdings.replace(files)
    return replace(holdings.snapshot, revision=1), (*holdings.errors(), *unlisted)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
