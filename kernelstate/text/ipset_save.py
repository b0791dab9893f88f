"""ipset as text: what ``ipset restore`` reads and ``ipset save`` prints.

    create KUBE-LOOP-BACK hash:ip,port,ip family inet hashsize 1024 maxelem 65536
    add KUBE-LOOP-BACK 10.244.1.7,tcp:8080,10.244.1.7
    create KUBE-NODE-PORT-TCP bitmap:port range 0-65535
    add KUBE-NODE-PORT-TCP 30080

Decides the words and their order: sets by name, members sorted. The ceiling (``maxelem``) is sized to the members, because
the kernel's default refuses the 65,537th. What ``ipset save`` says besides (hash size, bucket size, seed) is read over.

Source: ipset(8).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address, ip_network
from typing import cast, get_args

from kernelstate.diff_sets import room_for
from kernelstate.errors import ParseError
from kernelstate.objects.address import BITS, Family, address_text
from kernelstate.objects.sets import IpSet, IpSets, Member, SetSpec, SetType

_INET: dict[Family, str] = {4: "inet", 6: "inet6"}


def print_sets(sets: IpSets) -> str:
    """Print sets with their members as one ``ipset restore`` input; empty for no sets."""
    return "".join(f"{line}\n" for name in sorted(sets) for line in _set_lines(sets[name]))


def _set_lines(one: IpSet) -> Iterator[str]:
    yield print_create(one.spec, len(one.members))
    for text in sorted_members(one.spec, one.members):
        yield f"add {one.spec.name} {text}"


def print_create(spec: SetSpec, members: int) -> str:
    """Print the line that makes a set with room for so many members, without its end of line."""
    if spec.type == "bitmap:port":
        return f"create {spec.name} bitmap:port range 0-65535"
    counters = " counters" if spec.counters else ""
    return (
        f"create {spec.name} {spec.type} family {_INET[spec.family]} hashsize 1024 maxelem {room_for(spec, members)}{counters}"
    )


def sorted_members(spec: SetSpec, members: Iterable[Member]) -> list[str]:
    """Print members in the order of their numbers: addresses, protocols, ports, networks."""
    return [print_member(spec, member) for member in sorted(members)]


def print_member(spec: SetSpec, member: Member) -> str:
    """Print one member as ``add`` takes it: ``10.0.0.1,tcp:80,10.1.0.0/16``."""
    return ",".join(_parts(spec, member))


def _parts(spec: SetSpec, member: Member) -> Iterator[str]:
    left = iter(member)
    for dimension in spec.type.partition(":")[2].split(","):
        value = next(left)
        if isinstance(value, tuple):
            network, length = value
            host = length == BITS[spec.family]
            yield address_text(spec.family, network) + ("" if host else f"/{length}")
        elif isinstance(value, str):
            yield f"{value}:{next(left)}"
        else:
            yield str(value) if dimension == "port" else address_text(spec.family, value)


def parse_sets(text: str) -> IpSets:
    """Read what ``ipset save`` prints. Raises ParseError for a type that is not one of ours, or a line that is no such line."""
    specs: dict[str, SetSpec] = {}
    members: dict[str, set[Member]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        command, name, what, *options = [*line.split(), "", ""]
        if command not in {"create", "add"}:
            raise ParseError(line, "expected create or add")
        try:
            if command == "create":
                specs[name], members[name] = _read_spec(name, what, options), set()
            else:
                members[name].add(_read_member(specs[name], what))
        except (ValueError, KeyError) as error:
            raise ParseError(line, f"not a set or member as ipset save prints it ({error})") from error
    return {name: IpSet(spec, frozenset(members[name])) for name, spec in specs.items()}


def _read_spec(name: str, kind: str, options: list[str]) -> SetSpec:
    if kind not in get_args(SetType):
        raise ValueError(kind)
    family: Family = 6 if "inet6" in options else 4
    return SetSpec(name, cast("SetType", kind), family, "counters" in options)


def _read_member(spec: SetSpec, text: str) -> Member:
    if spec.type == "bitmap:port":
        return (int(text),)
    member: list[int | str | tuple[int, int]] = []
    for dimension, part in zip(spec.type.partition(":")[2].split(","), text.split(","), strict=True):
        if dimension == "port":
            protocol, _, port = part.partition(":")
            member += [protocol, int(port)]
        elif dimension == "net":
            network = ip_network(part)
            member.append((int(network.network_address), network.prefixlen))
        else:
            member.append(int(ip_address(part)))
    return tuple(member)
