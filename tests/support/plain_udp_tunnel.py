"""A UDP tunnel of flannel's kind in plain Python: one packet at a time, TUN to socket and back. Obviously right, and slow.

    TUN flannel0 --read--> longest prefix among the peers --> TTL - 1 --> sendto(peer, port)
                 <--write-- TTL - 1 <-- inner source inside that peer's prefix? <-- known peer? <-- recvfrom

Started like nodeplane-udp, answering the same words on its control socket, it stands in for it where the speed is not the
point; at the other end of a wire it is an independent implementation of the format. Source: flannel pkg/backend/udp/proxy_amd64.c.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import fcntl
import os
import selectors
import signal
import socket
import struct
import sys
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path

VERSION = "plain"
TUNSETIFF = 0x400454CA
UDP_NO_CHECK6_RX = 102
IFF_TUN, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x0100, 0x1000, 0x4000
VNET_HEADER = bytes(10)
"""struct virtio_net_hdr of a packet that is complete: no checksum left to do, no segments."""
COUNTERS = (
    *("sent_packets", "received_packets", "no_route", "ttl_exceeded"),
    *("unknown_peer", "wrong_source", "malformed", "send_errors"),
)
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


def attach(name: str, *, vnet: bool = True) -> int:
    """Open a queue of a TUN; one that is not there is made, and is gone with its last queue."""
    queue = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = IFF_TUN | IFF_NO_PI | ((IFF_VNET_HDR | IFF_MULTI_QUEUE) if vnet else 0)
    fcntl.ioctl(queue, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    return queue


def addresses(packet: bytes) -> tuple[Address, Address] | None:
    """Return source and destination of an IP packet; None for anything else."""
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        return IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
    if len(packet) >= 40 and packet[0] >> 4 == 6:
        return IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
    return None


def one_hop_further(packet: bytes) -> bytes | None:
    """Return a packet with its TTL or hop limit one less and, for IPv4, the header's checksum computed anew; None if it ran out."""
    at = 8 if packet[0] >> 4 == 4 else 7
    if packet[at] <= 1:
        return None
    changed = bytearray(packet)
    changed[at] -= 1
    if at == 8:
        size = (packet[0] & 15) * 4
        changed[10:12] = b"\0\0"
        total = sum(struct.unpack(f"!{size // 2}H", changed[:size]))
        total = (total & 0xFFFF) + (total >> 16)
        changed[10:12] = struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF)
    return bytes(changed)


class PlainTunnel:
    """One end. ``peers`` maps an inner network to the outer address and port."""

    def __init__(self, queue: int, sockets: dict[Address, socket.socket], *, vnet: bool = True) -> None:
        self.queue, self.sockets, self.vnet = queue, sockets, vnet
        self.peers: dict[Network, tuple[Address, int]] = {}
        self.counters = dict.fromkeys(COUNTERS, 0)

    def count(self, name: str) -> None:
        self.counters[name] += 1

    def peer_of(self, inner: Address) -> tuple[Address, int] | None:
        fitting = [n for n in self.peers if n.version == inner.version and inner in n]
        return self.peers[max(fitting, key=lambda n: n.prefixlen)] if fitting else None

    def from_tun(self) -> None:
        """Send one packet that waits at the TUN."""
        packet = os.read(self.queue, 1 << 16)[len(VNET_HEADER) if self.vnet else 0 :]
        ends = addresses(packet)
        if ends is None:
            return self.count("malformed")
        peer = self.peer_of(ends[1])
        if peer is None:
            return self.count("no_route")
        sent = one_hop_further(packet)
        if sent is None:
            return self.count("ttl_exceeded")
        try:
            own = next(a for a in self.sockets if a.version == peer[0].version)
            self.sockets[own].sendto(sent, (str(peer[0]), peer[1]))
        except OSError:
            return self.count("send_errors")
        return self.count("sent_packets")

    def from_socket(self, sock: socket.socket) -> None:
        """Write one datagram that waits at a socket to the TUN, if it may come in."""
        packet, sender = sock.recvfrom(1 << 16)
        ends = addresses(packet)
        if ends is None:
            return self.count("malformed")
        known = [n for n, (address, _) in self.peers.items() if address == ip_address(sender[0])]
        if not known:
            return self.count("unknown_peer")
        if not any(n.version == ends[0].version and ends[0] in n for n in known):
            return self.count("wrong_source")
        received = one_hop_further(packet)
        if received is None:
            return self.count("ttl_exceeded")
        with contextlib.suppress(OSError):  # the TUN is down
            os.write(self.queue, (VNET_HEADER if self.vnet else b"") + received)
        return self.count("received_packets")


class Process:
    """The tunnel with its control socket, until it is told to end."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.selector = selectors.DefaultSelector()
        self.staged: dict[socket.socket, dict[Network, tuple[Address, int]]] = {}
        self.done = False
        table: dict[Network, tuple[Address, int]] = {}
        if args.take_over:
            queue, sockets, table = take_over(args.control)
        else:
            queue, sockets = attach(args.tun), {ip_address(a): bind(a, args.port) for a in args.local}
        self.tunnel = PlainTunnel(queue, sockets)
        self.tunnel.peers = table
        self.selector.register(queue, selectors.EVENT_READ, self.on_tun)
        for sock in sockets.values():
            self.selector.register(sock, selectors.EVENT_READ, lambda sock=sock: self.tunnel.from_socket(sock))
        self.listener = listen(args.control)
        self.selector.register(self.listener, selectors.EVENT_READ, self.on_client)

    def run(self) -> None:
        while not self.done:
            for key, _ in self.selector.select(timeout=1.0):
                with contextlib.suppress(BlockingIOError):
                    key.data()

    def on_tun(self) -> None:
        try:
            self.tunnel.from_tun()
        except BlockingIOError:
            raise
        except OSError as error:
            sys.exit(f"{self.args.tun}: {error.strerror}")

    def on_client(self) -> None:
        client, _ = self.listener.accept()
        self.selector.register(client, selectors.EVENT_READ, lambda: self.on_request(client))

    def on_request(self, client: socket.socket) -> None:
        message = client.recv(1 << 16)
        if not message:
            self.selector.unregister(client)
            self.staged.pop(client, None)
            client.close()
            return
        lines = message.decode().splitlines()
        if lines == ["take-over"]:
            self.hand_over(client)
            return
        answer: list[str] = []
        try:
            for line in lines:
                answer += self.answer(client, line)
        except (ValueError, KeyError) as error:
            client.send(f"error {error}\n".encode())
        else:
            for start in range(0, len(answer), 500):
                client.send("".join(f"{a}\n" for a in answer[start : start + 500]).encode())
            client.send(b"ok\n")

    def answer(self, client: socket.socket, line: str) -> list[str]:
        peers = self.tunnel.peers
        match line.split():
            case ["show", "version"]:
                return [f"nodeplane-udp {VERSION}", f"pid {os.getpid()}", "queues 1", f"tun {self.args.tun}"]
            case ["show", "peers"]:
                return [f"peer {n} {peers[n][0]} {peers[n][1]}" for n in sorted(peers, key=lambda n: (n.version, n))]
            case ["show", "counters"]:
                return [f"{name} {value}" for name, value in self.tunnel.counters.items()]
            case ["peers", "begin"]:
                self.staged[client] = {}
            case ["peers", "commit"]:
                self.tunnel.peers = self.staged.pop(client)
            case ["peer", prefix, address, port]:
                self.staged.get(client, peers)[ip_network(prefix)] = (ip_address(address), int(port))
            case ["forget", prefix]:
                peers.pop(ip_network(prefix), None)
            case ["stop"]:
                self.done = True
            case _:
                raise ValueError(f"unknown request {line!r}")
        return []

    def hand_over(self, client: socket.socket) -> None:
        """Give queue and sockets to the process that asked, and end."""
        sockets = self.tunnel.sockets
        handles = array.array("i", [self.tunnel.queue, *(s.fileno() for s in sockets.values())])
        words = "".join(f"{line}\n" for line in ["tun", *(f"udp {a}" for a in sockets), "ok"])
        client.sendmsg([words.encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handles)])
        self.done = True


def take_over(control: str) -> tuple[int, dict[Address, socket.socket], dict[Network, tuple[Address, int]]]:
    """Get queue, sockets and table from the process that runs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as old:
        old.settimeout(2.0)
        old.connect(control)
        old.send(b"show peers\n")
        lines: list[str] = []
        while not lines or lines[-1] != "ok":
            lines += old.recv(1 << 16).decode().splitlines()
        table: dict[Network, tuple[Address, int]] = {}
        for line in lines[:-1]:
            _, prefix, address, port = line.split()
            table[ip_network(prefix)] = (ip_address(address), int(port))
        old.send(b"take-over\n")
        words, handles, _, _ = socket.recv_fds(old, 1 << 16, 16)
    names = words.decode().split("\n")[: len(handles)]
    sockets = {ip_address(n.split()[1]): socket.socket(fileno=h) for n, h in zip(names, handles, strict=True) if n != "tun"}
    return handles[names.index("tun")], sockets, table


def bind(address: str, port: int) -> socket.socket:
    """Return a socket that receives what is sent to an address and port."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_NO_CHECK6_RX, 1)  # RFC 6935: of tunnels, which may come without a checksum
    sock.setblocking(False)
    sock.bind((address, port))
    return sock


def listen(control: str) -> socket.socket:
    """Listen where an older process may still do so: from one moment to the next it is us."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fresh = Path(f"{control}.{os.getpid()}")
    listener.bind(str(fresh))
    listener.listen(16)
    fresh.replace(control)
    return listener


def main() -> None:
    """Be a forwarder until SIGTERM."""
    parser = argparse.ArgumentParser()
    for name, options in (("tun", {}), ("port", {"type": int}), ("control", {}), ("queues", {"type": int})):
        parser.add_argument(f"--{name}", **options)
    parser.add_argument("--local", action="append", default=[])
    parser.add_argument("--take-over", action="store_true")
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        Process(parser.parse_args()).run()
    except OSError as error:
        sys.exit(f"{error.filename or ''}: {error.strerror or error}")


if __name__ == "__main__":
    main()
