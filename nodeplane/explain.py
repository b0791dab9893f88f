"""``nodeplane explain``: what happens to the first packet of a new connection on one node, and why.

Two judges that share no code: the oracle walks the meaning of the objects, the simulator walks the rendered rules. Where they
disagree something is wrong with us, and the answer says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec

from clusterstate.objects import IPAddress
from kernelstate.objects.address import Prefix
from kernelstate.objects.netfilter import Protocol, Verdict
from kernelstate.service_layout import contents_of
from kernelstate.simulate import Packet, Simulator, Step
from kernelstate.simulate import Path as WalkedPath
from kernelstate.simulate_ebpf import EbpfSimulator
from kernelstate.simulate_ipvs import IpvsSimulator
from kernelstate.simulate_nftables import NftablesSimulator
from netpolicy.oracle import Flow as PolicyFlow
from nodeplane.commands import Failed, Usage
from nodeplane.explain_path import Journey, journey
from nodeplane.explain_policy import PolicyAnswer, PolicyExplainer
from nodeplane.objects_input import NodeView, read_view
from proxy.modes import TRAITS
from proxy.oracle import Flow, Judgement, Oracle, Outcome, parse_backend, print_backend
from proxy.render.iptables import NODE_PORTS
from proxy.render.iptables_shared import HEADS
from proxy.render.ipvs_rules import NODE_PORTS as IPVS_NODE_PORTS

_PROTOCOLS: dict[str, Protocol] = {"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}


class Question(msgspec.Struct, frozen=True):
    """One flow as asked; ``kind`` pod, node or external, or empty to find out."""

    source: IPAddress
    destination: IPAddress
    protocol: str
    port: int
    kind: str = ""


class FlowIn(msgspec.Struct, frozen=True):
    """One element of ``--flows``."""

    source_ip: str
    dest_ip: str
    dest_port: int
    protocol: str = "TCP"
    source_kind: str = ""


class Explainer:
    """Both judges for one node's view, ready for many flows."""

    def __init__(self, view: NodeView) -> None:
        self.view = view
        self.local = frozenset(_address(p) for p in view.facts.local_addresses)
        settings = view.config.services
        node = view.pipeline.compiler.node
        traits = TRAITS[view.config.mode]
        self.oracle = Oracle(view.pipeline.compiler.table, settings, node, self.local, traits) if settings else None
        self.simulator = simulator_of(view, self.local)
        self.policies = PolicyExplainer(view, self.local) if view.config.policy else None
        self.pods = {ip: pod for pod in view.snapshot.pods.values() if not pod.host_network for ip in pod.ips}

    def answer(self, question: Question) -> dict[str, Any]:
        """Judge one flow; the shape is the contract of ``--flows``."""
        kind = question.kind or self._kind(question.source)
        flow = Flow(
            source=question.source,
            destination=question.destination,
            protocol=question.protocol,
            port=question.port,
            from_node=kind == "node",
            interface=self._interface(kind),
            by_socket=kind == "node" or self._is_pod_here(question.source),
        )
        judgement = self.oracle.judge(flow) if self.oracle else Judgement(frozenset({Outcome("pass")}), ("Services are off",))
        walked = self.simulator.walk(packet_of(flow))
        simulated = frozenset(outcome_of(path) for path in walked)
        verdict = min(o.verdict for o in judgement.outcomes)
        endpoints = sorted(o.backend for o in judgement.outcomes if o.backend)
        destinations = [parse_backend(e)[0] for e in endpoints] or [question.destination]
        journeys = [None if self._is_here(d) else journey(self.view.desired, d) for d in destinations]
        paths = [self._path(d, one) for d, one in zip(destinations, journeys, strict=True)]
        policy = self._policy(question, destinations if verdict in {"dnat", "pass"} else [], judgement, kind)
        return {
            "service": {
                "verdict": verdict,
                "endpoints": endpoints,
                "masquerade": any(o.masquerade for o in judgement.outcomes),
            },
            "policy": {
                "egress": policy.egress,
                "ingress": policy.ingress,
                "allowed": policy.allowed,
                "because": list(policy.because),
            },
            "path": paths[0],
            "paths": dict(zip(endpoints, paths, strict=False)),
            "masqueraded": sorted(o.backend for o in judgement.outcomes if o.masquerade),
            "agree": simulated == judgement.outcomes and all(one is None or one.agree for one in journeys) and policy.agree,
            "steps": _steps(judgement, walked, simulated) + _journey_steps(destinations, journeys),
        }

    def _kind(self, source: IPAddress) -> str:
        if source in self.local or source.is_loopback:
            return "node"
        return "pod" if source in self.pods else "external"

    def _is_pod_here(self, source: IPAddress) -> bool:
        pod = self.pods.get(source)
        return pod is not None and pod.node == self.view.config.node_name

    def _interface(self, kind: str) -> str:
        """Return a link name of the kind a packet from such a source comes in through."""
        settings = self.view.config.services
        if kind == "pod" and settings is not None:
            return settings.bridge_interface or (settings.interface_name_prefix and settings.interface_name_prefix + "0")
        return "" if kind == "node" else self.view.facts.uplink.name if self.view.facts.uplink else "eth0"

    def _is_here(self, destination: IPAddress) -> bool:
        return destination in self.local or destination.is_loopback

    def _path(self, destination: IPAddress, found: Journey | None) -> dict[str, Any]:
        """Say where a packet to an address goes after translation; ``found`` is what the overlay does with it."""
        if self._is_here(destination):
            return {"kind": "node", "peer": None}
        if found is not None:
            return {"kind": found.path.kind, "peer": found.path.peer}
        own = self.view.snapshot.nodes.get(self.view.config.node_name)
        if own is not None and any(destination in c for c in own.pod_cidrs):
            return {"kind": "local", "peer": None}
        for node in self.view.snapshot.nodes.values():
            if any(destination == a.ip for a in node.addresses):
                return {"kind": "node", "peer": node.name}
            if any(destination in c for c in node.pod_cidrs):
                return {"kind": "external", "peer": node.name}  # whoever routes between the nodes, it is not us
        return {"kind": "external", "peer": None}

    def _policy(self, question: Question, destinations: list[IPAddress], judgement: Judgement, kind: str) -> PolicyAnswer:
        """Say what policies make of it; ``destinations`` are those that Services leave, in the order of their endpoints."""
        if self.policies is None:
            snapshot = self.view.snapshot
            counts = {"NetworkPolicies": len(snapshot.policies), "ClusterNetworkPolicies": len(snapshot.cluster_policies)}
            told = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
            because = (f"{told} are among the objects; policy.enabled is false, so none is enforced",) if told else ()
            return PolicyAnswer("none", "none", because, agree=True)
        ports = {parse_backend(o.backend): o for o in judgement.outcomes if o.backend}
        ends = sorted(ports) or [(d, question.port) for d in destinations]
        flows = [
            PolicyFlow(question.source, address, question.protocol, port, from_node=kind == "node")
            for address, port in ends
            if destinations and address.version == question.source.version
        ]
        return self.policies.answer(flows, [address for (address, _), o in ports.items() if o.masquerade])


def simulator_of(view: NodeView, local: Collection[IPAddress]) -> Simulator:
    """Return what walks packets over the rendered state of the view's mode."""
    services = view.desired.services
    match view.config.mode:
        case "nftables":
            return NftablesSimulator(services.tables, local)
        case "ebpf":
            return EbpfSimulator(contents_of(services.sockets), services.tables, local)
        case "ipvs":
            return IpvsSimulator(view.desired.ruleset_but_policies, services.sets, services.servers, services.addresses, local)
        case _:
            return Simulator(view.desired.ruleset_but_policies, local)


def run(args: argparse.Namespace) -> int:
    """Explain one flow, or a file of them."""
    if (args.flows is None) == (args.source is None or args.destination is None):
        raise Usage("explain: give either --from and --to, or --flows")
    explainer = Explainer(read_view(args))
    if args.flows is not None:
        answers = [explainer.answer(q) for q in read_flows(args.flows)]
        json.dump(answers, sys.stdout, indent=None if len(answers) > 100 else 1)
        sys.stdout.write("\n")
        return 0
    question = parse_question(explainer.view, args.source, args.destination)
    answer = explainer.answer(question)
    if args.output == "json":
        json.dump(answer, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        print("\n".join(_text(question, answer, explainer.view.config.node_name)))
    if not answer["agree"]:
        raise Failed("the oracle and the rendered rules disagree about this flow: please report it with the objects")
    return 0


def read_flows(path: Path) -> list[Question]:
    """Read a ``--flows`` file. Raises Usage naming element, field and value."""
    try:
        flows = msgspec.json.decode(path.read_bytes(), type=list[FlowIn])
    except OSError as error:
        raise Usage(f"--flows: {path}: {error.strerror}") from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise Usage(f"--flows: {path}: {error}") from error
    return [_question(flow, f"--flows: {path}: [{i}]") for i, flow in enumerate(flows)]


def _question(flow: FlowIn, at: str) -> Question:
    source = _parse_address(flow.source_ip, f"{at}.source_ip")
    destination = _parse_address(flow.dest_ip, f"{at}.dest_ip")
    if source.version != destination.version:
        raise Usage(f"{at}: source_ip {source} and dest_ip {destination} are of different families")
    if flow.source_kind not in {"", "pod", "node", "external"}:
        raise Usage(f"{at}.source_kind: must be pod, node or external, is {flow.source_kind!r}")
    return Question(
        source,
        destination,
        _parse_protocol(flow.protocol, f"{at}.protocol"),
        _parse_port(flow.dest_port, f"{at}.dest_port"),
        flow.source_kind,
    )


def parse_question(view: NodeView, source: str, destination: str) -> Question:
    """Read ``--from`` and ``--to``. Raises Usage."""
    address, _, rest = destination.rpartition(":")
    port, _, protocol = rest.partition("/")
    if not address or not port.isdigit():
        raise Usage(f"--to: must be IP:PORT or IP:PORT/PROTOCOL, is {destination!r}")
    to = _parse_address(address.strip("[]"), "--to")
    number = _parse_port(int(port), "--to")
    kind, origin = _origin(view, source, to.version)
    return Question(origin, to, _parse_protocol(protocol or "TCP", "--to"), number, kind)


def _origin(view: NodeView, source: str, family: int) -> tuple[str, IPAddress]:
    """Resolve ``--from``: namespace/pod, ``node``, or an address."""
    if source == "node":
        own = view.pipeline.compiler.node.primary(family)  # type: ignore[arg-type]
        if own is None:
            raise Usage(f"--from: Node {view.config.node_name} has no IPv{family} address among the objects")
        return "node", own
    if "/" in source:
        namespace, _, name = source.partition("/")
        pod = view.snapshot.pods.get((namespace, name))
        if pod is None:
            raise Usage(f"--from: no Pod {source} among the objects")
        ip = next((ip for ip in pod.ips if ip.version == family), None)
        if ip is None:
            raise Usage(f"--from: Pod {source} has no IPv{family} address among the objects")
        if pod.host_network:
            return ("node" if pod.node == view.config.node_name else "external"), ip
        return "pod", ip
    address = _parse_address(source, "--from")
    if address.version != family:
        raise Usage(f"--from: {address} and --to are of different families")
    return "", address


def outcome_of(path: WalkedPath) -> Outcome:
    """Bring a walk through the rules into the oracle's words."""
    if path.verdict != "accept":
        return Outcome(path.verdict)
    if path.dnat is not None:
        return Outcome("dnat", print_backend(*path.dnat), path.masquerade)
    by_name = any(isinstance(s, Step) and _lets_in(s) for s in path.steps)
    return Outcome("accept" if by_name else "pass")


def _lets_in(step: Step) -> bool:
    """Whether a step is the rule of a health check port: the only one that accepts in its own chain, or in one of its tree."""
    ports = step.chain in {NODE_PORTS, IPVS_NODE_PORTS} or step.chain.startswith(HEADS[NODE_PORTS])
    return ports and step.table == "filter" and step.rule.target is Verdict.ACCEPT


def packet_of(flow: Flow) -> Packet:
    """Return the packet that the simulator walks for a flow."""
    return Packet(
        protocol=_PROTOCOLS[flow.protocol],
        source=flow.source,
        destination=flow.destination,
        destination_port=flow.port,
        in_interface=flow.interface,
        from_local=flow.from_node,
        by_socket=flow.by_socket,
    )


def _steps(judgement: Judgement, walked: tuple[WalkedPath, ...], simulated: frozenset[Outcome]) -> list[str]:
    """Tell the story: the reasons, then one walk through the rules for each thing that may happen."""
    steps = [f"because: {reason}" for reason in judgement.because]
    shown: set[Outcome] = set()
    for path in walked:
        outcome = outcome_of(path)
        if outcome in shown:
            continue
        shown.add(outcome)
        title = outcome.backend or outcome.verdict
        steps.append(f"{title} with probability {path.probability:.4f}:")
        steps += [f"  {step}" for step in path.steps]
    if simulated != judgement.outcomes:
        steps.append(f"DISAGREE: oracle {sorted(judgement.outcomes)}, rules {sorted(simulated)}")
    return steps


def _journey_steps(destinations: Sequence[IPAddress], journeys: Sequence[Journey | None]) -> list[str]:
    """Say how each destination is reached, as far as the overlay has to do with it."""
    steps = []
    for destination, found in zip(destinations, journeys, strict=True):
        if found is not None:
            steps.append(f"to {destination}: {found}")
        if found is not None and not found.agree:
            steps.append(f"DISAGREE: oracle {found.path.kind} to {found.path.peer}, routes and tunnels {found.leaving}")
    return steps


def _text(question: Question, answer: dict[str, Any], node: str) -> list[str]:
    service, path = answer["service"], answer["path"]
    lines = [
        f"{question.source} -> {print_backend(question.destination, question.port)}/{question.protocol}, seen on {node}",
        "",
    ]
    match service["verdict"]:
        case "dnat":
            lines.append(f"  goes to one of {len(service['endpoints'])} endpoints:")
            for endpoint in service["endpoints"]:
                way = answer["paths"][endpoint]
                source = "source replaced" if endpoint in answer["masqueraded"] else "source kept"
                lines.append(f"    {endpoint}  {way['kind']}{' to ' + way['peer'] if way['peer'] else ''}, {source}")
        case "pass":
            lines.append(f"  no Service: {path['kind']}{' to ' + path['peer'] if path['peer'] else ''}")
        case verdict:
            lines.append(f"  {verdict}")
    policy = answer["policy"]
    if policy["because"]:
        lines += ["", f"  policies: egress {policy['egress']}, ingress {policy['ingress']}"]
        lines += [f"    {line}" for line in policy["because"]]
    lines += ["", "  " + "\n  ".join(answer["steps"]), ""]
    lines.append("  oracle and rules agree" if answer["agree"] else "  oracle and rules DISAGREE")
    return lines


def _parse_address(text: str, at: str) -> IPAddress:
    try:
        return ip_address(text)
    except ValueError as error:
        raise Usage(f"{at}: must be an IP address, is {text!r}") from error


def _parse_protocol(text: str, at: str) -> str:
    if text.upper() not in {"TCP", "UDP", "SCTP"}:
        raise Usage(f"{at}: protocol must be TCP, UDP or SCTP, is {text!r}")
    return text.upper()


def _parse_port(number: int, at: str) -> int:
    if not 1 <= number <= 65535:
        raise Usage(f"{at}: port must be between 1 and 65535, is {number}")
    return number


def _address(prefix: Prefix) -> IPAddress:
    return ip_address(prefix.address_text)
