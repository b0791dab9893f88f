"""Whether a packet is a member of an ipset, as the match ``set`` asks: ``--match-set KUBE-LOOP-BACK dst,dst,src``.

    hash:ip,port,ip        the set's type says what each dimension is,
         dst dst  src      the rule from which side of the packet it is taken

Decides membership only. Rules are walked by ``simulate.py``; a port of a hash set is asked together with the packet's protocol.
"""

from __future__ import annotations

from collections import defaultdict

from kernelstate.objects.address import BITS, Family
from kernelstate.objects.netfilter import SetMatch
from kernelstate.objects.sets import IpSet, IpSets, SetSpec

Side = tuple[int, int]
"""An address as a number, and a port."""


class SetReader:
    """Answers for a number of sets, which must not change meanwhile; those of networks are indexed at first use."""

    def __init__(self, sets: IpSets) -> None:
        self._sets = sets
        self._networks: dict[str, _Networks] = {}

    def holds(self, match: SetMatch, family: Family, protocol: str, source: Side, destination: Side) -> bool:
        """Whether the packet is a member, negation aside; a set that does not exist, or of the other family, has none."""
        found = self._sets.get(match.name)
        if found is None or (found.spec.type != "bitmap:port" and found.spec.family != family):
            return False
        asked = _asked(found.spec, match, protocol, source, destination)
        if "net" not in found.spec.type:
            return asked in found.members
        networks = self._networks.get(match.name)
        if networks is None:
            networks = self._networks[match.name] = _Networks(found)
        return networks.hold(asked)


def _asked(spec: SetSpec, match: SetMatch, protocol: str, source: Side, destination: Side) -> tuple[int | str, ...]:
    """Return the member that would be the packet's own; a network is asked for by an address."""
    asked: list[int | str] = []
    for dimension, side in zip(spec.type.partition(":")[2].split(","), match.dimensions, strict=True):
        address, port = source if side == "src" else destination
        if dimension != "port":
            asked.append(address)
        elif spec.type == "bitmap:port":
            asked.append(port)
        else:
            asked += [protocol, port]
    return tuple(asked)


class _Networks:
    """A set whose members have a network in them, first or last, by what else they say."""

    def __init__(self, held: IpSet) -> None:
        self._bits = BITS[held.spec.family]
        self._place = 0 if held.spec.type.startswith("hash:net") else -1
        self._by_rest: dict[tuple[object, ...], list[tuple[int, int]]] = defaultdict(list)
        for member in held.members:
            network = member[self._place]
            assert isinstance(network, tuple)
            self._by_rest[self._rest(member)].append(network)

    def hold(self, asked: tuple[int | str, ...]) -> bool:
        """Whether the address in the network's place lies in one of the networks of members that otherwise say the same."""
        address = int(asked[self._place])
        networks = self._by_rest.get(self._rest(asked), ())
        return any((address ^ network) >> (self._bits - length) == 0 for network, length in networks)

    def _rest(self, member: tuple[object, ...]) -> tuple[object, ...]:
        return member[1:] if self._place == 0 else member[:-1]
