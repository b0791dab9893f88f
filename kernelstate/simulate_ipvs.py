"""What rules, sets and virtual servers together do to the first packet of a connection: the packet filter's walk with IPVS in it.

      from elsewhere                                                   from this node
           |                                                                 |
      PREROUTING raw mangle nat                                       OUTPUT raw mangle nat
           |                                                                 |
       is the destination ours?                                         ( IPVS -98 )
        | yes        | no                                          found |       | not found
      INPUT          FORWARD mangle filter                               |    OUTPUT filter
      mangle filter  POSTROUTING                                         |       |
        |              leaves                                            |    as without IPVS
     ( IPVS 99 )                                                         |
  not found | | found                                                    |
            | '-------------> destination is now a real server's <-------'
      INPUT nat                              |
       accepted                 OUTPUT raw mangle filter, once more
                                             |
                                POSTROUTING mangle nat: leaves

A Service's address is one of the node's own, so packets for it come to INPUT, where IPVS stands behind the filter and before
nat (NF_IP_PRI_NAT_SRC - 1); a packet that the node sends itself meets IPVS right behind OUTPUT's nat (NF_IP_PRI_NAT_DST + 2)
and before OUTPUT's filter. What IPVS sends on enters OUTPUT from its top. nat is then passed by, because the connection had its
destination settled before; in POSTROUTING it is still to choose the source, so a mark made on the way in masquerades there.
A real server on the node itself is an ordinary local destination instead, and the hook goes on behind IPVS.

Decides as kernel net/netfilter/ipvs/ip_vs_core.c (ip_vs_ops4, ip_vs_in_hook, ip_vs_schedule, ip_vs_leave) and ip_vs_xmit.c
(ip_vs_nat_xmit) do, with ``net.ipv4.vs.conntrack=1``. Which real server a scheduler picks depends on its past: every one of
weight above 0 is possible, in proportion to the weights. A server with none answers port unreachable.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import msgspec

from kernelstate.objects.address import IPAddress, Prefix
from kernelstate.objects.ipvs import IpvsState, RealServer, ServerKey
from kernelstate.objects.netfilter import Ruleset
from kernelstate.objects.sets import IpSets
from kernelstate.simulate import Answer, OtherStep, Packet, Simulator, State, state_of
from kernelstate.text.ipvsadm import endpoint_text, print_server

Ends = list[tuple[Answer, State]]


class IpvsSimulator(Simulator):
    """Walks packets over rules, sets and virtual servers; ``held`` are the addresses on ``kube-ipvs0``, the node's own too."""

    def __init__(
        self,
        ruleset: Ruleset,
        sets: IpSets,
        servers: IpvsState,
        held: Iterable[Prefix],
        local_addresses: Collection[IPAddress] = (),
    ) -> None:
        super().__init__(ruleset, local_addresses, sets)
        self._servers = servers
        self._local |= {(address.family, address.network) for address in held}

    def way(self, packet: Packet) -> Iterator[tuple[Answer, State]]:
        """Lead a packet from hook to hook, IPVS' own among them."""
        ended: Ends = []
        through: list[State] = []
        states = [state_of(packet)]
        if packet.from_local:
            for state in self.hook("OUTPUT", packet, states, ended, ("raw", "mangle", "nat")):
                through += self._out(packet, state, ended)
        else:
            for state in self.hook("PREROUTING", packet, states, ended):
                through += self._in(packet, state, ended)
        yield from (("accept", state) for state in through)
        yield from ended

    def _out(self, packet: Packet, state: State, ended: Ends) -> list[State]:
        """Go on behind OUTPUT's nat with a packet of the node itself."""
        sent = self._schedule(state, ended)
        if sent is not None:
            here, away = self._apart(sent)
            through = self._leave(packet, away, ended)
            if not here:
                return through
            here = self._through_filter(packet, here, ended)
            return through + self.hook("INPUT", packet, here, ended)
        states = self._through_filter(packet, [state], ended)
        if self.is_local(state.family, state.destination):
            states = self.hook("INPUT", packet, states, ended)
        return states

    def _through_filter(self, packet: Packet, states: list[State], ended: Ends) -> list[State]:
        return self.hook("POSTROUTING", packet, self.hook("OUTPUT", packet, states, ended, ("filter",)), ended)

    def _in(self, packet: Packet, state: State, ended: Ends) -> list[State]:
        """Go on behind PREROUTING with a packet from elsewhere."""
        if not self.is_local(state.family, state.destination):
            states = self.hook("FORWARD", packet, [state], ended)
            return self.hook("POSTROUTING", packet, states, ended)
        through: list[State] = []
        for met in self.hook("INPUT", packet, [state], ended, ("mangle", "filter")):
            sent = self._schedule(met, ended)
            if sent is None:
                through += self.hook("INPUT", packet, [met], ended, ("nat",))
                continue
            here, away = self._apart(sent)
            through += self.hook("INPUT", packet, here, ended, ("nat",))
            through += self._leave(packet, away, ended)
        return through

    def _leave(self, packet: Packet, states: list[State], ended: Ends) -> list[State]:
        """Send what IPVS translated: through OUTPUT from its top, without nat, and out."""
        states = self.hook("OUTPUT", packet, states, ended, ("raw", "mangle", "filter"))
        return self.hook("POSTROUTING", packet, states, ended)

    def _apart(self, states: list[State]) -> tuple[list[State], list[State]]:
        """Part packets for real servers on the node itself from those for others."""
        parted: dict[bool, list[State]] = {True: [], False: []}
        for state in states:
            parted[self.is_local(state.family, state.destination)].append(state)
        return parted[True], parted[False]

    def _schedule(self, state: State, ended: Ends) -> list[State] | None:
        """Return a state for each real server that may be chosen; None where no virtual server answers."""
        if "NEW" not in state.conn_states or state.protocol not in {"tcp", "udp", "sctp"}:
            return None
        key = ServerKey(state.family, state.protocol, state.destination, state.destination_port)  # type: ignore[arg-type]
        server = self._servers.get(key)
        if server is None:
            return None
        words = "ipvs " + print_server(key, server)
        weights = sum(real.weight for real in server.real_servers)
        if not weights:
            step = OtherStep(words, "nobody is there: port unreachable")
            ended.append(("reject", msgspec.structs.replace(state, steps=(*state.steps, step))))
            return []
        return [_sent(state, real, real.weight / weights, words) for real in server.real_servers if real.weight]


def _sent(state: State, real: RealServer, chance: float, words: str) -> State:
    step = OtherStep(words, f"goes to {endpoint_text(state.family, real.address, real.port)}")
    return msgspec.structs.replace(
        state,
        probability=state.probability * chance,
        destination=real.address,
        destination_port=real.port,
        dnat=True,
        steps=(*state.steps, step),
    )
