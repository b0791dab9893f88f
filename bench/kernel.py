"""The kernel's part of a change: iptables-legacy-restore and what it makes the kernel do, in a namespace of its own.

Legacy reads and writes a whole table for every restore, however small the text, so this part grows with the cluster; the
agent can only keep the number of restores and of lines down.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import time
from collections.abc import Iterable, Iterator

import msgspec

from kernelstate.linux import netns
from kernelstate.linux.iptables import IptablesPort


class Applied(msgspec.Struct, frozen=True):
    """What one restore cost, in milliseconds: elapsed, and CPU time of the restore process with its system calls."""

    wall: float
    cpu: float


def may_use_kernel() -> bool:
    """Whether this process may make network namespaces."""
    return os.geteuid() == 0


@contextlib.contextmanager
def own_namespace() -> Iterator[str]:
    """Make a network namespace with a name nobody has; gone afterwards."""
    name = f"np-bench-{os.getpid()}-{secrets.token_hex(3)}"
    netns.create(name)
    try:
        yield name
    finally:
        netns.delete(name)


def apply_in_turn(texts: Iterable[str]) -> list[Applied]:
    """Hand IPv4 restore texts to iptables-legacy-restore one after the other in a fresh namespace. Raises KernelRefusedError."""
    port = IptablesPort("legacy")
    done = []
    with own_namespace() as name, netns.inside(name):
        for text in texts:
            wall, cpu = time.perf_counter(), _children()
            port.apply(4, text)
            done.append(Applied(1000 * (time.perf_counter() - wall), 1000 * (_children() - cpu)))
    return done


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
