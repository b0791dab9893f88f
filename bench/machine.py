"""The machine and the state of the tree a figure belongs to: without them it is a rumour."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from bench.result import Machine

TREE = Path(__file__).resolve().parent.parent


def machine_facts(command: str) -> Machine:
    """Return kernel, CPU, commit and the command that measured."""
    return Machine(kernel=platform.release(), cpu=cpu_name(), commit=commit(), command=command)


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the CPU's model and how many of them this process may use."""
    model = next((line.partition(":")[2].strip() for line in _lines(cpuinfo) if line.startswith("model name")), "")
    return f"{len(os.sched_getaffinity(0))} x {model or platform.machine()}"


def commit(tree: Path = TREE) -> str:
    """Return the commit of the tree, marked where files differ from it; ``unknown`` outside of a repository."""
    head = _git(tree, "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return f"{head}-dirty" if _git(tree, "status", "--porcelain") else head


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _git(tree: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
