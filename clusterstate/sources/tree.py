"""Files on disk as they are this moment: which there are, and what each holds.

Knows nothing of changes; ``files.py`` does. Source of the file names that count: ``watch.is_object_file``.
"""

# Paths are keys of dictionaries here, compared and cut as text, thousands at a time.
# ruff: noqa: PTH110

from __future__ import annotations

import errno
import gc
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from clusterstate.parse import parse_document
from clusterstate.snapshot import ObjectError
from clusterstate.sources.holdings import Holding, held
from clusterstate.sources.watch import is_object_file


class SourceError(Exception):
    """A given path that does not exist or cannot be listed: bad usage, not bad input."""


def whole(path: str, reason: str) -> ObjectError:
    """Return an error about a file or directory as a whole."""
    return ObjectError(path, None, "", reason)


def read_file(path: str, given: bool, before: Holding) -> Holding | None:
    """Read one file. Returns None where there is none."""
    try:
        data = content(path, only_regular=not given)
    except OSError as error:
        if not os.path.lexists(path):
            return None
        return Holding(before.objects, (whole(path, f"cannot be read: {error.strerror}"),))
    return held(parse_document(data, path, path.endswith(".json")), before)


def require(root: str) -> None:
    """Raise SourceError where a given path does not exist."""
    if not os.path.exists(root):
        raise SourceError(f"{root}: no such file or directory")


def walk(directory: str, enter: Callable[[str], None], refuse: Callable[[str, str], None]) -> Iterator[str]:
    """Yield the files of objects in a directory and below, in order; ``enter`` is called before each directory is listed.

    Raises OSError where the topmost cannot be entered or listed; ``refuse`` is told of the others.
    """
    enter(directory)
    with os.scandir(directory) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        path = entry.name if directory == "." else entry.path
        if not entry.is_dir(follow_symlinks=False):
            if is_object_file(entry.name):
                yield path
        elif not entry.name.startswith("."):
            try:
                yield from walk(path, enter, refuse)
            except OSError as error:
                refuse(path, f"cannot be listed: {error.strerror}")


def content(path: str, *, only_regular: bool) -> bytes:
    """Return what a file holds. Raises OSError; a pipe among objects must not hold up everything, a given one may be one."""
    with open(path, "rb", opener=lambda p, flag: os.open(p, flag | (os.O_NONBLOCK if only_regular else 0))) as file:
        if only_regular and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        return file.read()


@contextmanager
def gc_paused() -> Iterator[None]:
    """Keep the garbage collector out of a bulk load: it makes no cycles, and each collection would walk all made so far."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
