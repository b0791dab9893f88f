"""What happened to files and directories, through inotify: which to look at again, never what they hold.

    --objects a            a/            every directory of the tree is watched; hidden ones are no part of it
    --objects x/one.yaml     b/          the parent of each given path is watched too (its nearest ancestor while it is
                           x/            missing), so that a path that goes away is seen coming back

A file counts as touched when it was closed after writing, renamed, linked or deleted, so that one being written is not read
half-way; until it is closed again it is ``writing``. Symbolic links to directories are not followed, except a given path itself.
Moving away a directory *above* the parent of a given path goes unseen: inotify says nothing.
"""

# Paths are keys of dictionaries here, compared and cut as text, thousands at a time.
# ruff: noqa: PTH112, PTH118, PTH119, PTH120

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from select import POLLIN, poll

from inotify_simple import INotify, flags

GENERATION = ".generation"
KUBERNETES_DATA = "..data"
"""The link kubelet swaps when a ConfigMap or Secret volume changes: all files of its directory are links through it."""
SUFFIXES = (".json", ".yaml", ".yml")

_SELF = flags.DELETE_SELF | flags.MOVE_SELF | flags.MASK_ADD | flags.ONLYDIR
_NAMES = flags.CREATE | flags.DELETE | flags.MOVED_TO | flags.MOVED_FROM
_FILES = flags.CLOSE_WRITE | flags.MODIFY
_AWAY = flags.DELETE | flags.MOVED_FROM
_HERE = flags.CREATE | flags.MOVED_TO
_NO_MORE = flags.DELETE_SELF | flags.MOVE_SELF | flags.UNMOUNT


def is_object_file(name: str) -> bool:
    """Tell files of objects from hidden ones, editors' backups and half-done copies."""
    return name.endswith(SUFFIXES) and not name.startswith((".", "#"))


@dataclass(slots=True)
class Seen:
    """What to look at again. Paths are as given, joined with what lies below."""

    files: set[str] = field(default_factory=set)
    directories: set[str] = field(default_factory=set)
    """New, gone or replaced: everything below is to be listed again."""
    roots: set[str] = field(default_factory=set)
    """Given paths that may have come or gone."""
    generation: bool = False
    overflow: bool = False
    renamed: set[str] = field(default_factory=set)
    """Directories that now have another name in the same tree: gone on purpose."""
    moves: dict[int, str] = field(default_factory=dict)
    """Where directories were moved from, by inotify's cookie, until the other half of the move is seen."""
    unsettled: bool = False
    """Something was deleted, or a directory came: perhaps the first of many steps."""

    def __bool__(self) -> bool:
        """Tell whether there is anything to do."""
        return bool(self.files or self.directories or self.roots or self.generation or self.overflow)


class Watch:
    """Watches the trees of the given paths. Not for several threads."""

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = tuple(roots)
        self._inotify = INotify(nonblocking=True)
        self._poller = poll()
        self._poller.register(self._inotify.fileno(), POLLIN)
        self._paths: dict[int, set[str]] = {}
        self._tree: dict[str, int] = {}
        self._anchors: dict[str, int] = {}
        self.writing: set[str] = set()
        """Files that somebody has written to and not closed since, as far as was drained."""

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is something to drain."""
        return int(self._inotify.fileno())

    def close(self) -> None:
        """Stop watching."""
        self._inotify.close()

    def wait(self, milliseconds: int) -> bool:
        """Tell whether something happens within a time."""
        return bool(self._poller.poll(milliseconds))

    # -- what is watched ---------------------------------------------------------------------------------------------

    def add_directory(self, path: str) -> None:
        """Watch a directory of the tree. Raises OSError."""
        self._tree[path] = self._add(path, _SELF | _NAMES | _FILES)

    def anchor(self, root: str) -> None:
        """Watch the nearest existing directory above a given path. Raises OSError where there is none."""
        path = root
        for _ in range(64):
            path = _nearest_directory(os.path.dirname(root) or ".")
            with suppress(FileNotFoundError, NotADirectoryError):  # gone in between: look again, one further up
                self._anchors[path] = self._add(path, _SELF | _NAMES | (_FILES if not os.path.isdir(root) else 0))
            if path == _nearest_directory(os.path.dirname(root) or "."):
                return
        raise OSError(f"{path}: comes and goes too fast to be watched")

    def forget(self, directory: str) -> None:
        """Stop watching a directory and all below it: it is gone, or somewhere else, or about to be listed anew."""
        below = directory + os.sep
        self.writing = {path for path in self.writing if not path.startswith(below)}
        for path in [p for p in self._tree if p == directory or p.startswith(below)]:
            wd = self._tree.pop(path)
            if self._anchors.get(path) == wd:
                continue  # still needed to see a given path come back
            paths = self._paths.get(wd, set())
            paths.discard(path)
            if not paths:
                self._end(wd)

    def _end(self, wd: int) -> None:
        """End one watch and all that is known by it."""
        with suppress(OSError):  # the kernel ends the watch of a deleted directory by itself
            self._inotify.rm_watch(wd)
        for path in self._paths.pop(wd, set()):
            for table in (self._tree, self._anchors):
                if table.get(path) == wd:
                    del table[path]

    def _add(self, path: str, mask: int) -> int:
        wd = int(self._inotify.add_watch(path, mask))
        self._paths.setdefault(wd, set()).add(path)
        return wd

    # -- what happened -----------------------------------------------------------------------------------------------

    def drain(self, seen: Seen) -> bool:
        """Add everything that happened since to ``seen``, without waiting. Returns whether anything happened at all."""
        happened = False
        for wd, mask, cookie, name in self._inotify.read(timeout=0):
            happened = True
            if mask & flags.Q_OVERFLOW:
                seen.overflow = True
                self.writing.clear()
                continue
            for directory in tuple(self._paths.get(wd, ())):
                if not mask & flags.IGNORED:
                    self._one(seen, directory, mask, name, cookie)
            if mask & (_NO_MORE | flags.IGNORED):
                self._end(wd)
        return happened

    def _one(self, seen: Seen, directory: str, mask: int, name: str, cookie: int) -> None:
        """Sort one event of one directory."""
        path = name if directory == "." else os.path.join(directory, name)
        if directory in self._anchors:
            self._above(seen, path, mask)
        if directory not in self._tree or path in self._roots:
            return
        if mask & _NO_MORE:
            seen.directories.add(directory)
            seen.unsettled = True
        elif mask & flags.ISDIR:
            self._directory(seen, path, mask, cookie)
        elif name == KUBERNETES_DATA:
            seen.directories.add(directory)
        elif name == GENERATION:
            seen.generation |= directory in self._roots and not mask & (flags.MODIFY | flags.CREATE)
        elif is_object_file(name):
            self._file(seen, path, mask)

    def _above(self, seen: Seen, path: str, mask: int) -> None:
        """Sort an event in a directory above given paths: only what concerns these counts."""
        if mask & _NO_MORE:
            seen.roots.update(self._roots)
        elif path in self._roots and mask & (_FILES | flags.CREATE) and not mask & flags.ISDIR:
            self._file(seen, path, mask)
        elif mask & (_AWAY | _HERE):
            met = [root for root in self._roots if root == path or root.startswith(path + os.sep)]
            seen.roots.update(met)
            seen.unsettled |= bool(met and mask & flags.ISDIR)

    def _directory(self, seen: Seen, path: str, mask: int, cookie: int) -> None:
        """Sort an event about a directory of the tree, watching for both halves of a renaming."""
        hidden = os.path.basename(path).startswith(".")
        if mask & flags.MOVED_FROM and not hidden:
            seen.moves[cookie] = path
        elif mask & flags.MOVED_TO and not hidden and cookie in seen.moves:
            seen.renamed.add(seen.moves.pop(cookie))
        if not hidden:
            seen.directories.add(path)
            seen.unsettled = True

    def _file(self, seen: Seen, path: str, mask: int) -> None:
        if mask & flags.MODIFY:
            self.writing.add(path)
            return
        if mask & flags.CREATE and not _is_link(path):
            return  # it will be closed when it is written
        self.writing.discard(path)
        seen.files.add(path)
        if mask & _AWAY:
            seen.unsettled = True


def _is_link(path: str) -> bool:
    """Tell a link, which is whole when it appears, from a file that is just being made."""
    try:
        status = os.lstat(path)
    except OSError:
        return True  # already gone: look at it
    return stat.S_ISLNK(status.st_mode) or status.st_nlink > 1


def _nearest_directory(path: str) -> str:
    while not os.path.isdir(path):
        above = os.path.dirname(path) or "."
        if above == path:
            break
        path = above
    return path
