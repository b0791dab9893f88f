"""Processes that ask for Services: inside a cgroup and a network namespace, as those of a node and of its pods are."""

import contextlib
import os
import pickle
import secrets
from pathlib import Path

from kernelstate.linux import cgroups
from kernelstate.linux import netns as namespaces


@contextlib.contextmanager
def own_cgroup():
    """Make a cgroup below the machine's root; it is gone afterwards, with the programs that are on it."""
    path = cgroups.mounted()[0] / f"np-t-{os.getpid()}-{secrets.token_hex(3)}"
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()


def enter_cgroup(path):
    """Move the calling process into a cgroup."""
    Path(path, "cgroup.procs").write_text("0")


def ask(cgroup, space, function, *args):
    """Call a function in a process of its own inside cgroup and namespace; returns what it returns, fails as it fails."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reading)
            enter_cgroup(cgroup)
            with namespaces.inside(space), os.fdopen(writing, "wb") as out:
                try:
                    answer = True, function(*args)
                except BaseException as error:
                    answer = False, f"{type(error).__name__}: {error}"
                pickle.dump(answer, out)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answers:
        data = answers.read()
    os.waitpid(pid, 0)
    good, answer = pickle.loads(data)  # noqa: S301 (our own child)
    assert good, answer
    return answer
