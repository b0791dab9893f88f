"""The kernel's part of a change, in a namespace of its own; of iptables by handing the text to iptables-legacy-restore.

Legacy reads and writes a whole table for every restore, however small the text, so this part grows with the cluster; the
agent can only keep the number of restores and of lines down.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from kernelstate.linux import cgroups, netns, nftables
from kernelstate.linux.iptables import IptablesPort
from kernelstate.linux.ipvs import has_ipvs
from nodeplane.commands import Failed


class Applied(msgspec.Struct, frozen=True):
    """What one hand-over cost, in milliseconds: elapsed, and CPU time of the tool or library with its system calls."""

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


@contextlib.contextmanager
def place_for(mode: str) -> Iterator[None]:
    """Be where a measured agent of that mode writes: iptables' text goes nowhere, all else to a namespace of its own."""
    if mode == "iptables":
        yield
        return
    with own_namespace() as name, netns.inside(name):
        yield


@contextlib.contextmanager
def own_cgroup(name: str) -> Iterator[Path]:
    """Make a cgroup below the machine's root; programs that are left at it go with it. Raises Failed."""
    found = cgroups.mounted()
    if found is None:
        raise Failed("mode ebpf needs cgroups of version 2")
    path = found[0] / name
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()


@contextlib.contextmanager
def inside_cgroup(cgroup: Path | None) -> Iterator[None]:
    """Be in a cgroup for a while, as a pod's processes are."""
    found = cgroups.mounted()
    if cgroup is None or found is None:
        yield
        return
    own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    (cgroup / "cgroup.procs").write_text("0")
    try:
        yield
    finally:
        (found[0] / own.lstrip("/") / "cgroup.procs").write_text("0")


def modes_here(bench: str, modes: Sequence[str]) -> list[str]:
    """Return the modes whose agent can be measured here; the others are named on stderr. Raises Failed when none is left."""
    lacking = {mode: words for mode in modes if (words := _lacking(mode))}
    for mode, words in lacking.items():
        if len(lacking) == len(modes):
            raise Failed(f"{bench}: mode {mode} {words}")
        print(f"{bench}: mode {mode} is left out: it {words}", file=sys.stderr)
    return [mode for mode in modes if mode not in lacking]


def _lacking(mode: str) -> str:
    if mode == "iptables":
        return ""
    if not may_use_kernel():
        return "writes to the kernel while it is measured, and needs root"
    return "is not in this kernel, or python3-nftables is missing" if mode == "nftables" and not nftables.is_available() else ""


def kernel_is_real(mode: str) -> bool:
    """Whether what a measured agent of that mode writes is all taken by the kernel; of iptables, whether it can be afterwards."""
    return may_use_kernel() and (mode != "ipvs" or has_ipvs())


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
