"""What policies say of a connection, asked of both judges: the oracle by the policy table, the simulator by what is written.

Judged are this node's view and, where the other pod is among the objects, that of its node: the table of the whole cluster. Behind
a Service each endpoint is judged by its own address and port; with several, the answer is the strictest, for any may be drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from clusterstate.objects import IPAddress
from kernelstate.objects.netfilter import Protocol, Ruleset
from kernelstate.simulate import Packet, Simulator
from kernelstate.simulate_nftables import NftablesSimulator
from netpolicy.compile import compile_policies
from netpolicy.oracle import Flow, Judgement, Oracle
from nodeplane.objects_input import NodeView

_NETFILTER: dict[str, Protocol] = {"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}


class PolicyAnswer(msgspec.Struct, frozen=True):
    """The answer for all that may be reached; ``agree``: what is written for this node says the same."""

    egress: str
    ingress: str
    because: tuple[str, ...]
    agree: bool

    @property
    def allowed(self) -> bool:
        """Whether the connection comes about, whatever is drawn."""
        return "deny" not in (self.egress, self.ingress)


class PolicyExplainer:
    """Both judges of policies for one node's view."""

    def __init__(self, view: NodeView, local: Collection[IPAddress]) -> None:
        self._view = view
        self._local = local
        self._cluster = Oracle(compile_policies(view.snapshot, None))
        assert view.desired.policies is not None
        self._here = Oracle(view.desired.policies)
        state = view.desired.policy_state
        self._simulator: NftablesSimulator | Simulator = NftablesSimulator(dict(state.tables), local)
        if view.config.policy == "iptables":
            self._simulator = Simulator(Ruleset(state.chains, state.anchors), local, state.sets)
        self._nodes = {ip: p.node for p in view.snapshot.pods.values() if not p.host_network for ip in p.ips}

    def answer(self, flows: Sequence[Flow], masqueraded: Collection[IPAddress]) -> PolicyAnswer:
        """Judge a connection to each of several ends; ``masqueraded`` are those that see this node's address as source."""
        if not flows:
            return PolicyAnswer("none", "none", (), agree=True)
        judged = [self._judge(flow, replaced=flow.destination in masqueraded) for flow in flows]
        because = [line for one in judged for line in one.because]
        agree = all(self._agree(flow) for flow in flows)
        strictest = [max((getattr(one, side) for one in judged), key=_STRICT.index) for side in ("egress", "ingress")]
        return PolicyAnswer(strictest[0], strictest[1], tuple(dict.fromkeys(because)), agree)

    def _judge(self, flow: Flow, *, replaced: bool) -> Judgement:
        """Judge one connection. Pods of other nodes see the source as it arrives there, and no node's processes as their own."""
        here = self._view.config.node_name
        if self._nodes.get(flow.destination, here) == here:
            return self._cluster.judge(flow)
        own = [a for a in self._local if a.version == flow.destination.version]
        source = min(own) if replaced and own else flow.source
        egress = self._cluster.judge(msgspec.structs.replace(flow, from_node=False))
        ingress = self._cluster.judge(msgspec.structs.replace(flow, source=source, from_node=False))
        because = [line for line in egress.because if line.startswith("egress")]
        because += [line for line in ingress.because if line.startswith("ingress")]
        return Judgement(egress.egress, ingress.ingress, tuple(because))

    def _agree(self, flow: Flow) -> bool:
        """Whether this node's rules let through what its table lets through."""
        if flow.source in self._local and flow.destination in self._local:
            return True
        packet = Packet(
            _NETFILTER[flow.protocol],
            flow.source,
            flow.destination,
            flow.port,
            from_local=flow.from_node or flow.source in self._local,
        )
        judged = self._here.judge(msgspec.structs.replace(flow, from_node=packet.from_local))
        verdicts = {path.verdict for path in self._simulator.walk(packet)}
        return verdicts == {"accept" if judged.allowed else "drop"}


_STRICT = ("none", "allow", "deny")
