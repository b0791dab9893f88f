"""A node's own view of /run and /var/lib, in a mount namespace that only its processes see.

    on the host                                     as a node's agent, or `lab exec NODE`, sees it
    /run                                            /run              (tmpfs; the host's entries bound into it)
    /run/nodeplane/labs/<lab>/nodes/<node>/run      /run/nodeplane
    cgroup nodeplane-<lab>/<node>                   /run/nodeplane/cgroup  (the processes of the node and of its pods)
                                 .../objects        /run/nodeplane/objects
                        nodes/<node>/flannel        /run/flannel
                        nodes/<node>/xtables.lock   /run/xtables.lock   (nodes do not wait for each other's iptables)
                        nodes/<node>/lib            /var/lib/nodeplane
                        nodes/<node>/cni            /var/lib/cni
    sysfs of the host                               /sys              (of the node's network namespace, as `ip netns exec` does)

Nothing of it is to be seen on the host: no mount point is made there, and the mounts end with the last process. Mounts made on
the host later still arrive (MS_SLAVE), so namespaces can come and go. Source: mount_namespaces(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kernelstate.errors import KernelRefusedError
from kernelstate.linux import netns

CGROUP = "/run/nodeplane/cgroup"
"""The cgroup of a node's processes as its agent sees it."""
CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_SLAVE = 0x1000, 0x4000, 1 << 19

_libc = ctypes.CDLL(None, use_errno=True)


class NodeView(msgspec.Struct, frozen=True):
    """Which directories of the host are a node's own."""

    node_dir: Path
    objects: Path
    cgroup: Path | None = None
    """The cgroup of the node's processes, where there is one."""

    def make(self) -> None:
        """Make the directories, once."""
        for part in ("run/objects", "run/cgroup", "flannel", "lib", "cni", "staging"):
            (self.node_dir / part).mkdir(parents=True, exist_ok=True)
        (self.node_dir / "xtables.lock").touch()

    def mount(self) -> None:
        """Mount the view in the calling thread's mount namespace, which must be its own."""
        _mount(self.objects, self.node_dir / "run/objects", MS_BIND)
        if self.cgroup is not None and self.cgroup.exists():
            _mount(self.cgroup, self.node_dir / "run/cgroup", MS_BIND)
        own = {
            "nodeplane": self.node_dir / "run",
            "flannel": self.node_dir / "flannel",
            "xtables.lock": self.node_dir / "xtables.lock",
        }
        # /var/lib first: the sources lie below /run, and are hidden once that is covered.
        _cover(Path("/var/lib"), {"nodeplane": self.node_dir / "lib", "cni": self.node_dir / "cni"}, self.node_dir / "staging")
        _cover(Path("/run"), own, self.node_dir / "staging")


def enter(namespace: str, view: NodeView | None = None) -> None:
    """Move the calling thread into a network namespace, and a fresh mount namespace that belongs to it, for good."""
    if _libc.unshare(CLONE_NEWNS) != 0:
        raise KernelRefusedError("unshare mount namespace for", namespace, os.strerror(ctypes.get_errno()))
    _mount(None, Path("/"), MS_SLAVE | MS_REC)
    netns.enter(namespace)
    if view is not None:
        view.mount()
    with contextlib.suppress(KernelRefusedError):  # in a container that may not; only /sys/class/net is the host's then
        _mount(Path("sysfs"), Path("/sys"), 0, kind=b"sysfs")


def popen(namespace: str, view: NodeView | None, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a program as ``enter`` would place it; ``options`` are those of ``subprocess.Popen``."""
    started: list[subprocess.Popen[Any] | BaseException] = []

    def body() -> None:
        try:
            enter(namespace, view)
            started.append(subprocess.Popen(list(argv), **options))
        except BaseException as error:  # handed to the caller below
            started.append(error)

    thread = threading.Thread(target=body, name=f"start in {namespace}")
    thread.start()
    thread.join()
    if isinstance(started[0], BaseException):
        raise started[0]
    return started[0]


def is_mount(path: Path) -> bool:
    """Whether something is mounted on a path. The device tells nothing: /run/netns is mounted on itself."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(path) for line in lines)  # proc(5): the fifth field is the mount point


def release_netns_dir() -> None:
    """Undo that /run/netns is a mount (which the first named namespace of a host makes it), unless a namespace is left in it.

    Not MNT_DETACH: the kernel itself refuses while somebody else's namespace is mounted below.
    """
    with contextlib.suppress(OSError):
        if _libc.umount2(os.fsencode(netns.RUN_DIR), 0) == 0:
            netns.RUN_DIR.rmdir()


def _cover(parent: Path, own: Mapping[str, Path], staging: Path) -> None:
    """Cover a directory by a tmpfs that holds what it held, and under the names in ``own`` what is the node's."""
    _mount(Path("tmpfs"), staging, 0, kind=b"tmpfs", data=b"mode=755,size=1m")
    for child in sorted(parent.iterdir()):
        if child.name not in own:
            with contextlib.suppress(FileNotFoundError):  # it went away meanwhile
                _bring(child, staging / child.name)
    for name, source in own.items():
        _bring(source, staging / name)
    _mount(staging, parent, MS_BIND | MS_REC)


def _bring(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    if source.is_dir():
        target.mkdir()
    else:
        source.stat()
        target.touch()
    _mount(source, target, MS_BIND | MS_REC)


def _mount(source: Path | None, target: Path, flags: int, kind: bytes = b"none", data: bytes | None = None) -> None:
    text = os.fsencode(source) if source is not None else b"none"
    if _libc.mount(text, os.fsencode(target), kind, ctypes.c_ulong(flags), data) != 0:
        raise KernelRefusedError("mount", f"{source or ''} on {target}", os.strerror(ctypes.get_errno()))
