"""Measurements of nodeplane, each with the machine it was made on; ``nodeplane bench [NAME]`` runs them.

    BENCHMARKS --> measure(options) -> rows --> result (machine, command) --+--> table or JSON on stdout
                                                                            +--> DIR/NAME.json, DIR/NAME.png, DIR/index.html

Decides which benchmarks there are and what becomes of their rows. What each measures is in its own module, the form of a result
in ``result.py``, the pictures in ``plots.py``. Nothing here passes or fails: a reader, or a gate, judges the ratios.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from bench.machine import machine_facts
from bench.page import write_page
from bench.result import Options, Result, Row, result_table, write_result
from nodeplane.commands import Failed, Usage

BENCHMARKS: dict[str, str] = {
    "services-change": "bench.services_change",
    "services-full": "bench.services_full",
    "lab-up": "bench.lab_up",
    "api-sync": "bench.api_sync",
    "service-connect": "bench.service_connect",
    "services-sockets": "bench.services_sockets",
    "drift-repair": "bench.drift_repair",
    "packet-cost": "bench.packet_cost",
    "ipvs-in-vm": "bench.ipvs_in_vm",
    "overlay": "bench.overlay",
    "pod-attachment": "bench.pod_attachment",
    "cni-add": "bench.cni_add",
    "policy-verdict": "bench.policy_verdict",
    "policy-connect": "bench.policy_connect",
    "policy-change": "bench.policy_change",
}
"""Name on the command line -> module with a ``measure``."""

GROUPS: dict[str, tuple[str, ...]] = {"policy": ("policy-verdict", "policy-connect", "policy-change")}
"""Names for several benchmarks at once; their results are a list."""

BY_NAME_ONLY = frozenset({"ipvs-in-vm"})
"""Benchmarks that take too long to be run unasked."""

WITHOUT_SERVICES = frozenset({"lab-up", "overlay", "pod-attachment", "cni-add", *GROUPS["policy"]})
"""Benchmarks whose size is not a number of Services."""


PAGE = "page"
"""In place of a benchmark: only the page is written, of what was measured before."""


class Benchmark(Protocol):
    """What a benchmark's module offers."""

    def measure(self, options: Options) -> list[Row]:
        """Measure and return rows; what cannot be measured here is said on stderr and left out."""


def run(args: argparse.Namespace) -> int:
    """Run one benchmark, a group or, without a name, all that are not too long: of several, one that cannot run is named, and the others still do. Raises Usage, Failed."""
    if args.name == PAGE:
        return _page(args.results)
    names = _names(args.name, args.services)
    _modes(args.mode, names)
    results: list[Result] = []
    for name in names:
        print(f"{name}: measuring", file=sys.stderr)
        try:
            options = Options(services=args.services, modes=_modes(args.mode, [name]))
            results.append(_measure(name, options, args))
        except Failed as error:
            if args.name in BENCHMARKS:
                raise
            print(f"nodeplane: {error}", file=sys.stderr)
    if args.output == "json":
        answer = results[0] if args.name in BENCHMARKS else results
        print(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode())
    return 0 if len(results) == len(names) else 1


def _page(directory: Path) -> int:
    """Write the page of what has been measured already. Raises Failed."""
    path = write_page(directory, tuple(BENCHMARKS))
    if path is None:
        raise Failed(f"{directory}: holds no results to make a page of")
    print(path)
    return 0


def _measure(name: str, options: Options, args: argparse.Namespace) -> Result:
    """Run one benchmark; write and show what it found."""
    benchmark: Benchmark = importlib.import_module(BENCHMARKS[name])
    result = Result(name, machine_facts(_command(name, args)), benchmark.measure(options))
    write_result(result, args.results)
    _draw(result, args.results)
    write_page(args.results, tuple(BENCHMARKS))
    if args.output == "text":
        print(result_table(result), flush=True)
    return result


def _names(stated: str | None, services: int | None) -> list[str]:
    if services is not None and services < 1:
        raise Usage(f"--services: must be at least 1, is {services}")
    if stated is None:
        return [name for name in BENCHMARKS if name not in BY_NAME_ONLY]
    names = GROUPS.get(stated, (stated,))
    if not BENCHMARKS.keys() >= {*names}:
        raise Usage(f"bench: must be one of {', '.join((*BENCHMARKS, *GROUPS, PAGE))}, is {stated!r}")
    if services is not None and WITHOUT_SERVICES.intersection(names):
        raise Usage(f"--services: {stated} has nodes and pods, and no number of Services")
    return list(names)


MODES = ("iptables", "ipvs", "nftables")
"""Modes that everything is measured in; ``ebpf`` has the rules of ``nftables`` beneath."""
WITH_EBPF = frozenset({"packet-cost", "service-connect", "services-sockets"})
"""Benchmarks that have mode ``ebpf`` as well."""


def _modes(stated: str | None, names: Sequence[str]) -> tuple[str, ...]:
    """Return the modes to measure. Raises Usage."""
    modes = (*MODES, "ebpf") if WITH_EBPF.issuperset(names) else MODES
    if stated is not None and stated not in modes:
        raise Usage(f"--mode: must be one of {', '.join(modes)}, is {stated!r}")
    return modes if stated is None else (stated,)


def _command(name: str, args: argparse.Namespace) -> str:
    """Return the command that repeats this one benchmark."""
    words = ["nodeplane", "bench", name]
    if args.services is not None and name not in WITHOUT_SERVICES:
        words += ["--services", str(args.services)]
    if args.mode:
        words += ["--mode", args.mode]
    return shlex.join(words)


def _draw(result: Result, directory: Path) -> None:
    try:
        from bench.plots import draw  # noqa: PLC0415  0.7 s and 40 MB that no measuring process should carry
    except ModuleNotFoundError as error:
        print(f"{result.bench}: no picture: {error.name} is not installed", file=sys.stderr)
        return
    draw(result, directory / f"{result.bench}.png")
