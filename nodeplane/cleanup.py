"""``nodeplane cleanup``: remove every trace of nodeplane from this node's kernel and file system."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from kernelstate.errors import KernelStateError, MissingFeatureError
from kernelstate.linux.forwarder import LinuxForwarder
from kernelstate.linux.iptables import IptablesPort, families, is_available
from kernelstate.linux.links import LinuxLinks
from kernelstate.ports import Reconciler
from kernelstate.reconcile import NetfilterReconciler
from kernelstate.reconcile_forwarder import ForwarderReconciler
from kernelstate.reconcile_links import LinkReconciler
from nodeplane import pod_gate
from nodeplane.commands import Failed
from nodeplane.host_kernel import (
    FORWARDER,
    VARIANTS,
    leftover_lane,
    leftovers_of_sockets,
    other_modes,
    overlay_tables,
    policy_sets,
    policy_tables,
    tunnel_programs,
)
from nodeplane.kept_objects import OBJECTS_FILE
from nodeplane.lease_store import STATE_FILE as LEASE_FILE
from nodeplane.pipeline import OWNERSHIP
from nodeplane.status import LOCK_FILE, STATUS_FILE, AlreadyRunningError, read_status, take_lock

SUBNET_FILE = Path("/run/flannel/subnet.env")


def run(_args: argparse.Namespace) -> int:
    """Remove rules, links and routes of ours, then our files. Refuses while an agent runs: it would bring them back."""
    try:
        take_lock()
    except AlreadyRunningError as error:
        raise Failed(f"{error}; stop it first") from error
    except OSError as error:
        raise Failed(f"{LOCK_FILE}: {error.strerror}") from error
    status = read_status()
    errors: list[str] = []
    for reconciler in _reconcilers():
        try:
            report = reconciler.cleanup()
        except KernelStateError as error:
            errors.append(str(error))
            continue
        print(f"{report.part}: removed {report.changed}")
        errors += report.errors
    if status is not None and status.overlay:
        SUBNET_FILE.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            SUBNET_FILE.parent.rmdir()
    # The key in etcd is the cluster's: it ends by itself, and until then keeps the subnet for this node.
    pod_gate.remove()
    for file in (LEASE_FILE, OBJECTS_FILE, STATUS_FILE, LOCK_FILE):
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.parent.rmdir()
    if errors:
        raise Failed("; ".join(errors))
    return 0


def _reconcilers() -> Iterator[Reconciler]:
    """Yield one for each place where something of ours may be: an earlier agent may have used the other iptables."""
    for variant in VARIANTS:
        if is_available(variant):
            yield NetfilterReconciler(IptablesPort(variant), OWNERSHIP, families())
    yield from other_modes("", None)
    yield from leftovers_of_sockets()
    lane = leftover_lane()
    if lane is not None:
        yield lane
    yield overlay_tables()
    yield policy_tables()
    with contextlib.suppress(MissingFeatureError):
        yield policy_sets()
    yield ForwarderReconciler(LinuxForwarder(FORWARDER))
    programs = tunnel_programs()
    if programs is not None:
        yield programs
    yield LinkReconciler(LinuxLinks())
