"""``nodeplane status``: what is programmed on this node and how far it is from desired.

Exit 0: an agent runs and is in sync. 1: it is not, or there never was one.
"""

from __future__ import annotations

import argparse
import sys

import msgspec

from kernelstate.errors import KernelStateError
from nodeplane.commands import Failed
from nodeplane.denied import Denied, read_denied
from nodeplane.status import STATUS_FILE, Status, is_running, read_status, status_lines

SHOWN = 10
"""Pods, those with the most denied packets, that the text names."""


def run(args: argparse.Namespace) -> int:
    """Print the status of this node's agent."""
    try:
        status = read_status()
    except (OSError, msgspec.DecodeError) as error:
        raise Failed(f"{STATUS_FILE}: {error}") from error
    if status is None:
        raise Failed(f"no agent has run here: there is no {STATUS_FILE}")
    running = is_running()
    if args.output == "json":
        denied = {"denied": msgspec.to_builtins(_denied(status))} if status.policy else {}
        answer = msgspec.to_builtins(status) | denied | {"running": running}
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode() + "\n")
    else:
        lines = status_lines(status, running=running)
        denied_pods = _denied(status) if status.policy else []
        lines += [
            f"{'denied' if i == 0 else '':<9} {d.pod} {d.direction}: {d.packets:,} packets"
            for i, d in enumerate(denied_pods[:SHOWN])
        ]
        if len(denied_pods) > SHOWN:
            lines.append(f"          and {len(denied_pods) - SHOWN} more (all of them in -o json)")
        print("\n".join(lines))
    return 0 if running and status.synced else 1


def _denied(status: Status) -> list[Denied]:
    """Read what was denied from the kernel, where this process may."""
    try:
        return read_denied(status.policy, status.policy_pods)
    except (KernelStateError, OSError) as error:
        print(f"nodeplane: denied packets: {error}", file=sys.stderr)
        return []
