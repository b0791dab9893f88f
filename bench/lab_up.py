"""``lab-up``: a whole lab from nothing to every node in sync, and down again until nothing is left.

    nodeplane lab up     interpreter start, namespaces, cables, agents (one a node), pods, objects, all of them in sync
    nodeplane lab down   processes, namespaces, files

Measured from outside, as the one who types the commands waits for them.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.kernel import may_use_kernel
from bench.result import Options, Row, against
from netnslab.topology import BUNDLED
from nodeplane.commands import Failed

SIZES = ((3, 30), (10, 100))
"""(nodes, pods)."""
LONGEST = 300.0


def measure(options: Options, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Row]:
    """Bring up and take down a lab of each size. Raises Failed."""
    if not may_use_kernel():
        raise Failed("lab-up: a lab makes network namespaces, which needs root")
    rows: list[Row] = []
    for nodes, pods in sizes:
        params = {"nodes": nodes, "pods": pods}
        for word, took in zip(("up", "down"), _up_and_down(nodes, pods, options.mode), strict=True):
            row = Row(f"lab {word}", options.mode, dict(params), "elapsed", took, "s")
            smaller = next((r for r in rows if r.name == row.name), None)
            words = f"same with {sizes[0][0]} nodes, {sizes[0][1]} pods"
            rows.append(against(row, smaller.value, words) if smaller else row)
    return rows


def _up_and_down(nodes: int, pods: int, mode: str) -> tuple[float, float]:
    """Return seconds up and down."""
    name = f"bench-{secrets.token_hex(3)}"
    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory:
        topology = Path(directory) / "topology.toml"
        topology.write_text("\n".join(_topology(nodes, pods)))
        up = ["up", "--topology", str(topology), "--services", mode, "--timeout", str(LONGEST)]
        try:
            took = _lab(name, up)
        except BaseException:
            subprocess.run(_words(name, ["down"]), capture_output=True, timeout=LONGEST, check=False)
            raise
        return took, _lab(name, ["down"])


def _topology(nodes: int, pods: int) -> Iterator[str]:
    yield f'objects = ["{BUNDLED / "hostnames.yaml"}"]'
    for i in range(1, nodes + 1):
        yield f'[[nodes]]\nname = "node-{i}"'
    yield f'[[pods]]\nname = "hostnames"\nreplicas = {pods}\nports = [{{ containerPort = 9376 }}]'


def _lab(name: str, words: list[str]) -> float:
    """Run one lab command and return the seconds it took. Raises Failed with its last line."""
    started = time.perf_counter()
    try:
        done = subprocess.run(_words(name, words), capture_output=True, text=True, timeout=2 * LONGEST, check=False)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"lab-up: nodeplane lab {words[0]} is not done after {2 * LONGEST:g} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise Failed(f"lab-up: nodeplane lab {words[0]} ended with {done.returncode}: {lines[-1] if lines else 'no word'}")
    return time.perf_counter() - started


def _words(name: str, words: list[str]) -> list[str]:
    return [sys.executable, "-m", "nodeplane", "lab", *words, "--name", name]
