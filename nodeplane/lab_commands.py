"""`nodeplane lab ...`: its options, what it prints, and which of the lab's functions does the work.

The lab itself is ``netnslab``; this module reads arguments, says how far things are on stderr and prints facts on stdout.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from nodeplane.commands import Failed, Usage

DEFAULT_NAME = "lab"
SYNC_SECONDS = 120.0


def add_lab_parser(subparsers: Any) -> None:
    """Add `lab` and its commands."""
    lab = subparsers.add_parser("lab", help="a cluster of network namespaces on this machine; needs root")
    commands = lab.add_subparsers(dest="lab_command", metavar="LAB_COMMAND", required=True)
    up = _command(commands, "up", _up, "bring up a lab; returns when every node is in sync")
    up.add_argument("--topology", metavar="F", help="a TOML file, or the name of a bundled one (default: three-nodes)")
    up.add_argument(
        "--objects", action="append", default=[], metavar="P", help="Kubernetes objects; may be given several times"
    )
    up.add_argument("--services", metavar="MODE", help="service mode: iptables, ipvs, nftables or ebpf")
    up.add_argument("--overlay", metavar="BACKEND", help="vxlan, host-gw or udp")
    up.add_argument("--policy", metavar="MODE", help="enforce NetworkPolicies: nftables or iptables")
    up.add_argument("--api", action="store_true", help="with an API server of the lab's own, for kubectl; the agents follow it")
    _timeout(up)
    status = _command(commands, "status", _status, "nodes, pods, Services and whether they are in sync")
    _output(status)
    for word, function, text in (
        ("apply", _apply, "create or replace objects"),
        ("delete", _delete, "delete objects, by kind, namespace and name"),
    ):
        change = _command(commands, word, function, text)
        change.add_argument(
            "-f", "--filename", action="append", required=True, metavar="P", help="file, directory or - (stdin)"
        )
    switch = _command(commands, "switch", _switch, "let running nodes change their service mode, under whatever load there is")
    switch.add_argument("mode", metavar="MODE", help="iptables, ipvs, nftables or ebpf")
    switch.add_argument("--node", action="append", default=[], metavar="N", help="only this node; may be given several times")
    _timeout(switch)
    wait = _command(commands, "wait", _wait, "wait until every agent has programmed the latest change")
    _timeout(wait)
    execute = _command(commands, "exec", _exec, "run a program in a pod, a node, external or router")
    execute.add_argument("place", metavar="POD|NODE", help="namespace/pod, pod, node, external or router")
    execute.add_argument("rest", nargs=argparse.REMAINDER, metavar="-- CMD", help="the program and its arguments")
    probe = _command(commands, "probe", _probe, "try connections, in parallel")
    probe.add_argument("--probes", required=True, metavar="FILE", help="a JSON list of {from, to or to_ip, port, protocol}")
    _output(probe)
    down = _command(commands, "down", _down, "take a lab down; leaves nothing behind")
    down.add_argument("--all", action="store_true", help="every lab of this machine")
    _command(commands, "demo", _demo, "show it all, step by step, in about a minute").set_defaults(name=None)


def _command(commands: Any, word: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(word, help=text, description=text)
    parser.add_argument("--name", metavar="L", default=DEFAULT_NAME, help=f"the lab's name (default: {DEFAULT_NAME})")
    parser.set_defaults(run=lambda args: _checked(function, args))
    return parser


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")


def _timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--timeout", type=float, default=SYNC_SECONDS, metavar="S", help="seconds to wait (default: 120)")


def _checked(function: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; what goes wrong in the lab becomes an exit code."""
    from kernelstate.errors import KernelStateError  # noqa: PLC0415  (with the lab's modules, only when one runs)
    from netnslab.errors import LabError, LabInputError  # noqa: PLC0415

    if os.geteuid() != 0:
        raise Failed("a lab makes network namespaces, which needs root")
    try:
        return function(args)
    except LabInputError as error:
        raise Usage(str(error)) from error
    except (LabError, KernelStateError) as error:
        raise Failed(str(error)) from error


def _lab(module: str) -> Any:
    """Import one of the lab's modules, when it is needed: pyroute2 alone takes 0.2 s, which `lab exec` need not pay."""
    return importlib.import_module(f"netnslab.{module}")


class Progress:
    """One line a stage on stderr; on a terminal one line that changes."""

    def __init__(self) -> None:
        self.started, self.live = time.monotonic(), sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        """Say what is being done."""
        line = f"{time.monotonic() - self.started:6.1f} s  {text}"
        if self.live and not text.startswith("warning"):
            width = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{line[: width - 1]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self.live:
            print(file=sys.stderr)


# -- up and down -----------------------------------------------------------------------------------------------------


def _up(args: argparse.Namespace) -> int:
    planned, progress = read_plan(args.topology, args.objects, args.services, args.overlay, args.policy), Progress()
    for line in planned.ignored:
        print(f"left out: {line}: a lab has no use for this kind", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that being told to stop also takes down what was made
    state = _lab("lab").up(args.name, planned.topology, planned.given, progress, timeout=args.timeout, api=args.api)
    progress(f"lab {args.name} is up: {len(state.topology.nodes)} nodes and {len(state.pods)} pods in sync")
    progress.end()
    _say_problems(state)
    if state.kubeconfig is not None:
        print(f"export KUBECONFIG={state.kubeconfig}")
    return 0


def read_plan(
    topology: str | None, objects: list[str], services: str | None, overlay: str | None, policy: str | None = None
) -> Any:
    """Read a topology and objects as `lab up` is given them. Raises LabInputError."""
    return _lab("plan").read_plan(topology, objects, services, overlay, policy)


def _say_problems(state: Any) -> None:
    """Print what the agents say cannot be had, each line once."""
    said: dict[str, list[str]] = {}
    for node in state.topology.nodes:
        status, _ = _lab("agents").agent_status(state, node.name)
        for problem in (*status.problems, *status.object_errors) if status else ():
            said.setdefault(problem, []).append(node.name)
    for problem, nodes in said.items():
        print(f"{', '.join(nodes)}: {problem}", file=sys.stderr)


def _down(args: argparse.Namespace) -> int:
    names = _lab("state").lab_names() if args.all else [args.name]
    for name in names:
        progress = functools.partial(_say_of, name)
        _lab("lab").down(name, progress)
    return 0


def _say_of(name: str, text: str) -> None:
    print(f"lab {name}: {text}", file=sys.stderr)


# -- looking ---------------------------------------------------------------------------------------------------------


def _status(args: argparse.Namespace) -> int:
    state = _lab("state").load(args.name)
    if args.output == "json":
        print(json.dumps(_lab("look").facts(state), indent=2))
    else:
        print("\n".join(_lab("look").drawing(state)))
    return 0


def _probe(args: argparse.Namespace) -> int:
    probe = _lab("probe")
    probes = probe.load(args.probes, _lab("state").load(args.name))
    if any(p.protocol == "SCTP" for p in probes) and not probe.has_sctp():
        print("nodeplane: this kernel has no SCTP, so those probes cannot connect", file=sys.stderr)
    answers = probe.run_probes(probes)
    if args.output == "json":
        print(json.dumps([a.fact() for a in answers], indent=2))
        return 0
    for asked, got in zip(probes, answers, strict=True):
        result = f"answered by {got.answered_by}, which saw {got.source_seen}" if got.answered_by else "connected"
        outcome = result if got.connected else f"NOT connected: {got.why}"
        print(f"{asked.netns} -> {asked.ip} port {asked.port}/{asked.protocol}: {outcome} ({got.ms} ms)")
    return 0


def _exec(args: argparse.Namespace) -> int:
    options, command = split_command(args.rest)
    if options[:1] == ["--name"] and len(options) == 2:
        args.name = options[1]
    elif options:
        raise Usage(f"lab exec: {options[0]!r} before --: the program comes after --")
    if not command:
        raise Usage("lab exec: which program? For example: nodeplane lab exec node-1 -- ip route")
    enter = _lab("enter")
    enter.become(enter.find_place(_lab("state").load(args.name), args.place), command)
    return 0


def split_command(rest: list[str]) -> tuple[list[str], list[str]]:
    """Split what follows the place into options and the program: at the first ``--``, or before a word that is no option."""
    if "--" in rest:
        at = rest.index("--")
        return rest[:at], rest[at + 1 :]
    at = 2 if rest[:1] == ["--name"] else 0
    return rest[:at], rest[at:]


# -- changing --------------------------------------------------------------------------------------------------------


def _apply(args: argparse.Namespace) -> int:
    reading = _lab("given").read_objects(args.filename)
    for line in reading.ignored:
        print(f"left out: {line}: a lab has no use for this kind", file=sys.stderr)
    change = _lab("lab").apply(args.name, reading.objects)
    _print_change(change)
    return 0


def _delete(args: argparse.Namespace) -> int:
    change = _lab("lab").delete(args.name, list(_lab("given").read_objects(args.filename).objects))
    _print_change(change)
    if change.missing:
        raise Failed(f"not there: {', '.join(map(str, change.missing))}")
    return 0


def _switch(args: argparse.Namespace) -> int:
    nodes = _lab("lab").switch(args.name, args.mode, args.node, timeout=args.timeout)
    print(f"{', '.join(nodes)}: Services in {args.mode}", file=sys.stderr)
    return 0


def _print_change(change: Any) -> None:
    for word in ("created", "changed", "deleted"):
        for ref in getattr(change, word):
            print(f"{ref} {word}", file=sys.stderr)
    for line in change.warnings:
        print(f"warning: {line}", file=sys.stderr)


def _wait(args: argparse.Namespace) -> int:
    state = _lab("state").load(args.name)
    if state.api_port:
        state.generation = _lab("api.remote").settle(state)
    for node in _lab("agents").await_sync(state, args.timeout):
        print(f"nodeplane: {node} has no running agent and was not waited for", file=sys.stderr)
    return 0


def _demo(_args: argparse.Namespace) -> int:
    return int(_lab("demo").run())
