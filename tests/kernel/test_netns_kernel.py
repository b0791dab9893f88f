"""Named network namespaces."""

from __future__ import annotations

import socket
import subprocess
import threading
from pathlib import Path

import pytest

from kernelstate.errors import KernelRefusedError
from kernelstate.linux import netns as namespaces

pytestmark = pytest.mark.kernel


def inode() -> int:
    return Path(namespaces.OWN).stat().st_ino


def test_inside_moves_one_thread_and_back(netns: str) -> None:
    """Only the calling thread is inside, its children too, and it is home again afterwards."""
    home = inode()
    with namespaces.inside(netns):
        there = inode()
        others: list[int] = []
        started_outside = threading.Thread(target=lambda: others.append(namespaces.call(netns, inode)))
        started_outside.start()
        started_outside.join()
        child = subprocess.run(["readlink", "/proc/self/ns/net"], capture_output=True, text=True, check=True).stdout.strip()
    assert (inode(), others, child) == (home, [there], f"net:[{there}]")
    assert there != home


def test_loopback_is_up_and_ip_netns_sees_it(netns: str) -> None:
    """A new namespace answers on its loopback and iproute2 knows it by name."""
    with namespaces.inside(netns), socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.settimeout(5)
        client.connect(server.getsockname())
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert netns in listed.split()
    assert netns in namespaces.names()


def test_errors_name_the_namespace(netns: str) -> None:
    """Creating twice and entering what is not there raise with the name and the kernel's words; deleting twice is fine."""
    with pytest.raises(KernelRefusedError, match=f"create network namespace {netns}: File exists"):
        namespaces.create(netns)
    with pytest.raises(KernelRefusedError, match="enter network namespace np-t-none: No such file"):
        namespaces.enter("np-t-none")
    with pytest.raises(KernelRefusedError, match=r"false in .*: exit status 1"):
        namespaces.run(netns, ["false"])
    namespaces.delete(netns)
    namespaces.delete(netns)
    assert not namespaces.exists(netns)


def test_a_failure_inside_comes_home(netns: str) -> None:
    """An exception in the body leaves the thread where it was, and call hands the exception over."""
    home = inode()
    with pytest.raises(ZeroDivisionError), namespaces.inside(netns):
        _ = 1 // 0
    with pytest.raises(ZeroDivisionError):
        namespaces.call(netns, lambda: 1 // 0)
    assert inode() == home
