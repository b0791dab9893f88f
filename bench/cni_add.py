"""``cni-add``: how long a container runtime waits for ``nodeplane-cni``, and for Debian's bridge plugin in the same place.

    alone          one pod after another
    10 at a time   as many pods begin in the same moment, on however few cores
    starting up    the same program asked for VERSION: interpreter and imports, and nothing done

Each call is measured from outside, from executing the plugin to reading its answer. Both plugins ask the same host-local for addresses,
whose time is in theirs. The node is a namespace of its own, the pods are empty ones, the records lie on a tmpfs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.kernel import may_use_kernel
from bench.result import Options, Row, against, median, p95
from kernelstate.errors import KernelStateError
from kernelstate.linux import netns
from netnslab.cni_runtime import CniFailed, CniRuntime, Pod
from nodeplane.commands import Failed

ROUNDS = 20
TOGETHER = 10
TARGET = 150.0
"""Milliseconds that an ADD may take."""
DEBIAN = Path("/usr/lib/cni")
OURS, THEIRS = "nodeplane-cni", "bridge"
SUBNET_ENV = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"


class Rig(msgspec.Struct, frozen=True):
    """A node, pods without an interface, and a directory for what plugins keep."""

    node: str
    pods: tuple[str, ...]
    directory: Path


def measure(_options: Options, rounds: int = ROUNDS, together: int = TOGETHER) -> list[Row]:
    """Measure ADD and DEL of both plugins. Raises Failed."""
    if not may_use_kernel():
        raise Failed("cni-add: making network namespaces needs root")
    if not (DEBIAN / THEIRS).exists():
        raise Failed(f"cni-add: {DEBIAN / THEIRS} is not installed (Debian's containernetworking-plugins)")
    rows: list[Row] = []
    try:
        with open_rig(together) as rig:
            for plugin in (OURS, THEIRS):
                runtime = CniRuntime(conflist(plugin, rig), plugin_path(), rig.directory / "results")
                rows += _starting_up(rig, runtime, plugin, rounds)
                for count in (1, together):
                    rows += _adding(rig, runtime, plugin, count, rounds)
    except (KernelStateError, CniFailed) as error:
        raise Failed(f"cni-add: {error}") from error
    return _with_ratios(rows)


@contextlib.contextmanager
def open_rig(pods: int) -> Iterator[Rig]:
    """Make the namespaces; gone afterwards."""
    stem = f"np-bench-{os.getpid()}-{secrets.token_hex(3)}"
    with contextlib.ExitStack() as undo:
        names = [f"{stem}-node", *(f"{stem}-pod-{i}" for i in range(pods))]
        for name in names:
            netns.create(name)
            undo.callback(netns.delete, name)
        directory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="nodeplane-bench-", dir="/run")))
        (directory / "subnet.env").write_text(SUBNET_ENV)
        yield Rig(names[0], tuple(names[1:]), directory)


def plugin_path() -> str:
    """Return where plugins are: ours beside the interpreter, then Debian's."""
    return os.pathsep.join([os.path.dirname(sys.executable), str(DEBIAN)])  # noqa: PTH120  not resolved: the environment's


def conflist(plugin: str, rig: Rig) -> dict[str, Any]:
    """Return the network list that has pods attached by one plugin, with what flannel would state."""
    ipam = {"type": "host-local", "dataDir": str(rig.directory / "networks")}
    if plugin == OURS:
        ours = {"subnetFile": str(rig.directory / "subnet.env"), "dataDir": str(rig.directory / "records"), "ipam": ipam}
        return {"cniVersion": "1.0.0", "name": OURS, "plugins": [{"type": OURS, **ours}]}
    theirs = {"bridge": "cni0", "isDefaultGateway": True, "hairpinMode": True, "mtu": 1450}
    ranges = {**ipam, "ranges": [[{"subnet": "10.244.1.0/24"}]]}
    return {"cniVersion": "1.0.0", "name": THEIRS, "plugins": [{"type": THEIRS, **theirs, "ipam": ranges}]}


def _starting_up(rig: Rig, runtime: CniRuntime, plugin: str, rounds: int) -> list[Row]:
    conf = runtime.conflist["plugins"][0]
    took = [_timed(lambda: netns.call(rig.node, runtime.execute, "VERSION", conf, None, None)) for _ in range(rounds)]
    return _rows(f"{plugin}: starting up", 1, took)


def _adding(rig: Rig, runtime: CniRuntime, plugin: str, count: int, rounds: int) -> list[Row]:
    """Measure ``rounds`` times ADD, then DEL, of ``count`` pods at a time."""
    adds: list[float] = []
    deletes: list[float] = []
    for i in range(rounds if count == 1 else -(-rounds // 4)):
        pods = [Pod(f"{plugin}-{i}-{one}", str(netns.path(name))) for one, name in enumerate(rig.pods[:count])]
        adds += _at_once(rig, pods, runtime.add)
        deletes += _at_once(rig, pods, runtime.delete)
    return [*_rows(f"{plugin}: ADD", count, adds), *_rows(f"{plugin}: DEL", count, deletes)]


def _at_once(rig: Rig, pods: Sequence[Pod], verb: Callable[[Pod], object]) -> list[float]:
    """Do a verb for all pods in the same moment; return the milliseconds each took. Raises what the first that failed raised."""
    took: list[float] = []
    failures: list[BaseException] = []
    gate = threading.Barrier(len(pods))

    def body(pod: Pod) -> None:
        try:
            netns.enter(rig.node)
            gate.wait(timeout=10)
            took.append(_timed(lambda: verb(pod)))
        except BaseException as error:  # raised below, in the thread that waits
            gate.abort()
            failures.append(error)

    threads = [threading.Thread(target=body, args=(pod,)) for pod in pods]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return took


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def _rows(name: str, count: int, took: Sequence[float]) -> list[Row]:
    params = {"at a time": count}
    return [Row(name, "", dict(params), "p50", median(took), "ms"), Row(name, "", dict(params), "p95", p95(took), "ms")]


def _with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Give each row of ours its ratio to the bridge plugin's, and say what was aimed at."""
    found = []
    for row in rows:
        theirs = next(
            (r for r in rows if r.name == row.name.replace(OURS, THEIRS) and (r.params, r.metric) == (row.params, row.metric)),
            row,
        )
        found.append(row if theirs is row else against(row, theirs.value, f"{THEIRS} plugin"))
    add = next(row for row in rows if (row.name, row.metric) == (f"{OURS}: ADD", "p95") and row.params["at a time"] == 1)
    return [*found, against(Row("claim: ADD alone, p95", "", {}, "p95", add.value, "ms"), TARGET, f"at most {TARGET:g} ms")]
