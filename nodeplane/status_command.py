"""``nodeplane status``: what is programmed on this node and how far it is from desired.

Exit 0: an agent runs and is in sync. 1: it is not, or there never was one.
"""

from __future__ import annotations

import argparse
import sys

import msgspec

from nodeplane.commands import Failed
from nodeplane.status import STATUS_FILE, is_running, read_status, status_lines


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
        answer = msgspec.to_builtins(status) | {"running": running}
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode() + "\n")
    else:
        print("\n".join(status_lines(status, running=running)))
    return 0 if running and status.synced else 1
