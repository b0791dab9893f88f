"""IPVS as text: what ``ipvsadm -R`` reads and ``ipvsadm -S -n`` prints.

    -A -t 10.96.0.10:53 -s rr -p 10800              a virtual server, its scheduler, persistence in seconds
    -a -t 10.96.0.10:53 -r 10.244.1.7:53 -m -w 1    a real server behind it: masquerading (NAT), weight

Decides the words and their order: servers sorted by family, protocol, address and port, each with its real servers below it.
Reads back those words and no others: ipvsadm can say more (firewall marks, tunnels), and none of it is ever ours.

Source: ipvsadm(8).
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

from kernelstate.errors import ParseError
from kernelstate.objects.address import Family, address_text
from kernelstate.objects.ipvs import IpvsProtocol, IpvsState, RealServer, ServerKey, VirtualServer

PROTOCOL_OPTIONS: dict[IpvsProtocol, str] = {"tcp": "-t", "udp": "-u", "sctp": "--sctp-service"}
_PROTOCOLS: dict[str, IpvsProtocol] = {option: protocol for protocol, option in PROTOCOL_OPTIONS.items()}


def print_servers(state: IpvsState) -> str:
    """Print everything as one ``ipvsadm -R`` input; empty for an empty state."""
    return "".join(f"{line}\n" for key in sorted(state) for line in server_lines(key, state[key]))


def server_lines(key: ServerKey, server: VirtualServer) -> Iterator[str]:
    """Yield the line of a virtual server and those of its real servers."""
    yield print_server(key, server)
    name = _name(key)
    for real in server.real_servers:
        yield f"-a {name} -r {endpoint_text(key.family, real.address, real.port)} -m -w {real.weight}"


def print_server(key: ServerKey, server: VirtualServer) -> str:
    """Print the line that makes a virtual server, without its end of line."""
    persistence = f" -p {server.timeout}" if server.timeout else ""
    by_port = f" -b {server.scheduler}-port" if server.by_port else ""
    return f"-A {_name(key)} -s {server.scheduler}{persistence}{by_port}"


def _name(key: ServerKey) -> str:
    return f"{PROTOCOL_OPTIONS[key.protocol]} {endpoint_text(key.family, key.address, key.port)}"


def endpoint_text(family: Family, address: int, port: int) -> str:
    """Print ``10.96.0.1:80`` or ``[fd00::1]:80``."""
    text = address_text(family, address)
    return f"{text}:{port}" if family == 4 else f"[{text}]:{port}"


def parse_servers(text: str) -> IpvsState:
    """Read what ``ipvsadm -S -n`` prints. Raises ParseError for what is not one of our forms."""
    servers: IpvsState = {}
    reals: dict[ServerKey, list[RealServer]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        words = line.split()
        if words[0] not in {"-A", "-a"}:
            raise ParseError(line, "expected -A or -a")
        try:
            key = _read_key(words[1], words[2])
            if words[0] == "-A":
                servers[key], reals[key] = _read_server(words[3:]), []
            else:
                reals[key].append(_read_real(key.family, words[3:]))
        except (ValueError, KeyError, IndexError) as error:
            raise ParseError(line, f"not a NAT server of ours as ipvsadm -S -n prints it ({error})") from error
    return {
        key: VirtualServer(server.scheduler, tuple(sorted(reals[key])), server.timeout, server.by_port)
        for key, server in servers.items()
    }


def _read_key(option: str, name: str) -> ServerKey:
    family, address, port = _read_endpoint(name)
    return ServerKey(family, _PROTOCOLS[option], address, port)


def _read_endpoint(text: str) -> tuple[Family, int, int]:
    host, _, port = text.rpartition(":")
    address = ip_address(host.strip("[]"))
    return address.version, int(address), int(port)


def _read_server(words: list[str]) -> VirtualServer:
    options = dict(zip(words[::2], words[1::2], strict=True))
    scheduler = options.pop("-s")
    timeout = int(options.pop("-p", "0"))
    flags = options.pop("-b", "")
    if options or flags not in {"", f"{scheduler}-port"}:
        raise ValueError(" ".join(words))
    return VirtualServer(scheduler, (), timeout, bool(flags))


def _read_real(family: Family, words: list[str]) -> RealServer:
    option, name, method, weight_option, weight = words
    of_family, address, port = _read_endpoint(name)
    if (option, method, weight_option, of_family) != ("-r", "-m", "-w", family):
        raise ValueError(" ".join(words))
    return RealServer(address, port, int(weight))
