"""`lab demo`: three nodes, nine pods, one Service, and what the kernel makes of it, told step by step.

Each step says in a sentence or two what is to be seen, shows it, and checks it; the last line and the exit code say whether all
of it was so. Brings up a lab of its own and takes it down, whatever happens.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

from clusterstate.objects import ObjectRef
from kernelstate.linux import netns
from netnslab import agents, lab, look, plan, probe
from netnslab import state as states
from netnslab.errors import LabError
from netnslab.state import LabState

CONNECTIONS = 150
"""With nine pods equally likely, one of them is missed by all of these once in five million times."""
SERVICE = "hostnames"


class Demo:
    """The demo's lab, and what did not come out as it should."""

    def __init__(self, state: LabState) -> None:
        self.state = state
        self.failures: list[str] = []
        service = next(s for s in look.services(state) if s["name"] == SERVICE)
        self.cluster_ip, port = str(service["cluster_ips"][0]), service["ports"][0]
        self.port, self.node_port = int(port["port"]), int(port["node_port"])
        self.client, self.node = "default/hostnames-1", state.topology.nodes[0]

    def expect(self, true: bool, what: str) -> None:
        """Note an expectation that did not hold."""
        if not true:
            self.failures.append(what)
            print(f"   !! {what}")

    # -- steps -------------------------------------------------------------------------------------------------------

    def topology(self) -> None:
        """Show the lab."""
        _title("A cluster of network namespaces", "Every node is a namespace with the real agent in it; every pod is one, too.")
        _print(look.drawing(self.state))
        _print(["", "  Look around with `ip netns list`; `ip netns exec NAME ...` is a shell on any of these machines."])

    def cluster_ip_answers(self) -> None:
        """Connect to the ClusterIP from a pod."""
        _title(
            f"A ClusterIP: {self.cluster_ip}:{self.port}, asked {CONNECTIONS} times from {self.client}",
            "No machine has this address. The node's packet filter rewrites the first packet of each connection to one of the",
            "pods, picked at random; pods on other nodes are reached through the VXLAN tunnel.",
        )
        self._tally(self.state.pod(self.client).netns, self.cluster_ip, self.port)  # type: ignore[union-attr]

    def node_port_answers(self) -> None:
        """Connect to a NodePort from outside."""
        external = self.state.node_netns("external")
        _title(
            f"A NodePort: {self.node.ips[0]}:{self.node_port}, asked {CONNECTIONS} times from outside the cluster",
            "The client knows only a node's address. That node passes the connection on and puts its own address in place of the",
            "client's (masquerade), so that the answer comes back the same way.",
        )
        sources = self._tally(external, self.node.ips[0], self.node_port)
        _print([f"  sources the pods saw: {', '.join(f'{s} ({n})' for s, n in sorted(sources.items()))}"])
        self.expect("192.168.50.250" not in sources, "a pod saw the client's own address: the NodePort was not masqueraded")

    def rules(self) -> None:
        """Show the rules that did it."""
        status, _ = agents.agent_status(self.state, self.node.name)
        variant = status.iptables_variant if status and status.iptables_variant else "legacy"
        saved = netns.run(self.state.node_netns(self.node.name), [f"iptables-{variant}-save", "-t", "nat"]).splitlines()
        _title(
            f"The rules that did it, on {self.node.name}",
            f"As `iptables-{variant}-save -t nat` prints them there; kube-proxy writes the same.",
        )
        chain = _jump_of(saved, "KUBE-SERVICES", f"-d {self.cluster_ip}/32")
        spread = [line for line in saved if line.startswith(f"-A {chain} ") and "KUBE-SEP-" in line]
        one = spread[-1].split()[-1] if spread else ""
        _rules("the ClusterIP leads to the Service's chain", _rules_with(saved, "-A KUBE-SERVICES", f"-d {self.cluster_ip}/32"))
        _rules("so does the NodePort, by way of a chain that masquerades", _rules_with(saved, "-A KUBE-NODEPORTS", ""))
        _rules("one rule a pod: 1 in 9 for the first, 1 in 8 of the rest for the next, the last takes all", spread)
        _rules(
            "a pod's chain rewrites the destination (and masquerades a pod that reaches itself)",
            _rules_with(saved, f"-A {one} ", ""),
        )
        self.expect(len(spread) == len(self.state.pods), f"{len(spread)} rules spread the traffic, not {len(self.state.pods)}")

    def explain(self) -> None:
        """Run `nodeplane explain` for one packet."""
        _title(
            "One packet, explained",
            "`nodeplane explain` finds out from the objects alone, by simulating the rules and by asking what they mean. Here is",
            "one of the ways in full, to a pod on another node.",
        )
        command = ["--objects", str(self.state.objects), "--node", self.node.name]
        command += ["--config", str(self.state.node_dir(self.node.name) / "run/config.yaml")]
        command += ["--from", self.client, "--to", f"{self.cluster_ip}:{self.port}"]
        done = subprocess.run(
            [sys.executable, "-m", "nodeplane", "explain", *command], capture_output=True, text=True, timeout=60, check=False
        )
        _print([f"  {line}" for line in one_way((done.stdout or done.stderr).splitlines())])
        self.expect(done.returncode == 0, f"nodeplane explain ended with {done.returncode}")

    def pod_killed(self) -> None:
        """Kill a pod while connections keep coming."""
        _title(
            "A pod is killed while connections keep coming",
            "default/hostnames-5 goes without a warning. Until every node has taken its rule out, which is what is waited for,",
            "a connection may still be sent its way; after that none is.",
        )
        answers: list[probe.Answer] = []
        stop = threading.Event()
        source = self.state.pod(self.client).netns  # type: ignore[union-attr]
        asked = probe.Probe(source, self.cluster_ip, self.port, "TCP", 1.0)

        def load() -> None:
            while not stop.is_set():
                answers.extend(probe.run_probes([asked]))

        thread = threading.Thread(target=load)
        thread.start()
        try:
            started = time.monotonic()
            lab.delete(self.state.name, [ObjectRef("Pod", "default", "hostnames-5")])
            self.state = states.load(self.state.name)
            agents.await_sync(self.state, lab.SYNC_SECONDS)
            took = time.monotonic() - started
        finally:
            stop.set()
            thread.join()
        lost = sum(not a.connected for a in answers)
        _print([f"  every node knew after {1000 * took:.0f} ms; meanwhile {len(answers)} connections, {lost} of them lost"])
        self._tally(source, self.cluster_ip, self.port)

    # -- seeing ------------------------------------------------------------------------------------------------------

    def _tally(self, source: str, ip: str, port: int) -> Counter[str]:
        """Connect many times, print who answered, and expect it to be every pod there is; return the sources they saw."""
        answers = probe.run_probes([probe.Probe(source, ip, port, "TCP")] * CONNECTIONS)
        tally = Counter(a.answered_by for a in answers if a.answered_by)
        for pod in sorted(self.state.pods, key=lambda p: p.key):
            print(f"  {pod.key:<22} {pod.node:<8} {tally[pod.key]:4}  {'#' * tally[pod.key]}")
        lost = [a for a in answers if not a.connected]
        self.expect(not lost, f"{len(lost)} of {CONNECTIONS} connections failed: {lost[0].why if lost else ''}")
        silent = sorted({p.key for p in self.state.pods} - tally.keys())
        self.expect(not silent, f"never answered: {', '.join(silent)}")
        return Counter(a.source_seen for a in answers if a.source_seen)


def run() -> int:
    """Run the demo; return 0 if everything was as it said, else 1."""
    name = f"demo-{os.getpid()}"
    planned = plan.read_plan(None, [], None, None)
    started = time.monotonic()
    state = lab.up(name, planned.topology, planned.given, _say)
    try:
        _say(f"up after {time.monotonic() - started:.1f} s")
        demo = Demo(state)
        for step in (
            demo.topology,
            demo.cluster_ip_answers,
            demo.node_port_answers,
            demo.rules,
            demo.explain,
            demo.pod_killed,
        ):
            step()
    finally:
        lab.down(name, _say)
    left = [n for n in netns.names() if n.startswith(f"np-{name}-")]
    demo.expect(not left, f"namespaces are left: {', '.join(left)}")
    if demo.failures:
        raise LabError(f"the demo did not go as it should: {'; '.join(demo.failures)}")
    print(f"\nEverything was as it said, in {time.monotonic() - started:.0f} s, and nothing of it is left on this machine.")
    print("Next: `nodeplane lab up`, and the exercises in netns-lab/scenarios/.")
    return 0


def _say(text: str) -> None:
    print(f"   {text}", file=sys.stderr, flush=True)


def _title(title: str, *sentences: str) -> None:
    _print(["", f"== {title}", *(f"   {s}" for s in sentences), ""])


def _print(lines: list[str]) -> None:
    print("\n".join(lines), flush=True)


def _rules(sentence: str, rules: list[str]) -> None:
    _print([f"  # {sentence}", *(f"  {_short(r)}" for r in rules), ""])


def _short(rule: str) -> str:
    """Leave the comment match out of a rule, for a screen's width."""
    return re.sub(r' -m comment --comment ("[^"]*"|\S+)', "", rule)


def one_way(lines: list[str]) -> list[str]:
    """Shorten an explanation: of the ways a packet may go, each with its steps below it, keep the last."""
    starts = [i for i, line in enumerate(lines) if " with probability " in line]
    kept = lines[: starts[0]] + lines[starts[-1] :] if starts else lines
    return [_short(line) for line in kept]


def _rules_with(saved: list[str], start: str, part: str) -> list[str]:
    return [line for line in saved if line.startswith(start) and part in line and "no endpoints" not in line]


def _jump_of(saved: list[str], chain: str, part: str) -> str:
    """Return the chain that a rule jumps to."""
    found: Any = next((line for line in saved if line.startswith(f"-A {chain} ") and f"{part} " in line), None)
    if found is None:
        raise LabError(f"there is no rule with {part} in {chain}")
    return str(found.split()[-1])
