"""Which processes are a node's and its pods': a cgroup for each node, so that programs at sockets see those of one node only.

    cgroup2 root
      '-- nodeplane-<lab>
            |-- node-1      its agent, the responder of its pods, pods with a command, `lab exec`, probes
            '-- node-2

On a machine of its own a node's cgroup is the root. Where cgroups of version 2 cannot be had, a lab does without: then sockets are
not told of Services, and packets meet rules. A cgroup goes with its last process. Source: cgroups(7).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from kernelstate.linux import cgroups
from netnslab.errors import LabError

_MOVE = 'echo 0 > "$0" && exec "$@"'
"""A shell moves itself and becomes the program: no socket of the program's is made anywhere else."""
GONE_SECONDS = 5.0


def path(lab: str, node: str = "") -> Path | None:
    """Return the cgroup of a node, or of a whole lab, there or not; None where there are no cgroups of version 2."""
    found = cgroups.mounted()
    return found[0] / f"nodeplane-{lab}" / node if found else None


def make(lab: str, nodes: Sequence[str]) -> None:
    """Make the cgroups of a lab's nodes; where that is not allowed there are none."""
    for node in nodes:
        own = path(lab, node)
        if own is not None:
            with contextlib.suppress(OSError):
                own.mkdir(parents=True, exist_ok=True)


def within(lab: str, node: str, argv: Sequence[str], seen_at: str = "") -> list[str]:
    """Return a command that runs another inside a node's cgroup, or that other where the node has none.

    ``seen_at``: where the cgroup is for who has another view of the machine's files.
    """
    own = path(lab, node)
    if own is None or not own.exists():
        return list(argv)
    return ["sh", "-c", _MOVE, f"{seen_at or own}/cgroup.procs", *argv]


def enter(lab: str, node: str) -> None:
    """Move the calling process into a node's cgroup, if it has one."""
    own = path(lab, node)
    if own is not None and own.exists():
        (own / "cgroup.procs").write_text("0")


def remove(lab: str) -> None:
    """Remove a lab's cgroups once their processes are gone. Raises LabError when that takes too long."""
    root, end = path(lab), time.monotonic() + GONE_SECONDS
    if root is None or not root.exists():
        return
    for folder in [*(p for p in root.iterdir() if p.is_dir()), root]:
        while True:
            try:
                os.rmdir(folder)  # noqa: PTH106  a cgroup's files go with it
                break
            except FileNotFoundError:
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise LabError(f"cgroup {folder} stays: {error.strerror}") from error
                time.sleep(0.01)  # bounded; the kernel takes a moment to let go of a killed process
