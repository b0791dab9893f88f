"""One node's kernel between two hands: packets are put on its links and whatever it makes of them is picked up.

                     namespace N: the node                  namespace W: everything else, as raw wires
      local pods    10.244.1.0/24  via cni0, veth1   ------  frames in, frames out
      other pods    10.244.2.0/24  via flannel.1     ------
      the world     default        via eth0 192.168.1.1 ---
      node itself   raw socket in N

Every packet carries an identity that survives translation (TCP sequence number, UDP payload, SCTP tag), so hundreds of flows
can be under way at once. Neighbours are permanent: nothing has to answer.
"""

import contextlib
import select
import socket
import struct
import time
from ipaddress import ip_address

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6ParamProblem, IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Raw

from kernelstate.linux import netns as namespaces

LINKS = ("cni0", "veth1", "flannel.1", "eth0")
MAC_N, MAC_W = "02:00:00:00:00:0{}", "02:00:00:00:01:0{}"
ETH_P_ALL = 3
PACKET_OUTGOING = 4
MAGIC = b"nodeplane-flow:"


class Wire:
    """The rig: make it with two namespaces, ``send`` flows, ``collect`` what became of them."""

    def __init__(self, node, world):
        self.node, self.world = node, world
        self._lay()
        self._undo = contextlib.ExitStack()
        self._sniffers = {name: self._sniffer(world, f"w-{i}") for i, name in enumerate(LINKS)}
        self._loopback = self._sniffer(node, "lo")
        with namespaces.inside(node):
            self._raw = {
                4: self._undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)),
                6: self._undo.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)),
            }

    def close(self):
        """Close every socket."""
        self._undo.close()

    def _lay(self):
        """Make links, addresses, routes and permanent neighbours."""
        batch = []
        for i, name in enumerate(LINKS):
            batch += [
                f"link add {name} address {MAC_N.format(i)} type veth peer name w-{i} address {MAC_W.format(i)} netns {self.world}",
                f"link set {name} up",
            ]
        batch += [
            "addr add 192.168.1.1/24 dev eth0",
            "addr add fd00:99::1/64 dev eth0 nodad",
            "route add 10.244.1.0/24 via 169.254.1.1 dev veth1 onlink",
            "route add 10.244.2.0/24 via 169.254.1.2 dev flannel.1 onlink",
            "route add default via 192.168.1.254",
            "route add fd00:244::/64 via fe80::11 dev veth1 onlink",
            "route add fd00:244:0:1::/64 via fe80::12 dev flannel.1 onlink",
            "route add default via fd00:99::fe",
        ]
        for next_hop, link in (
            ("169.254.1.1", "veth1"), ("169.254.1.2", "flannel.1"), ("192.168.1.254", "eth0"), ("192.168.1.2", "eth0"),
            ("fe80::11", "veth1"), ("fe80::12", "flannel.1"), ("fd00:99::fe", "eth0"), ("fd00:99::2", "eth0"),
        ):  # fmt: skip
            batch.append(f"neigh add {next_hop} lladdr {MAC_W.format(LINKS.index(link))} nud permanent dev {link}")
        settings = [
            "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.ipv4.conf.all.route_localnet=1",
            "net.ipv4.icmp_ratelimit=0", "net.ipv4.icmp_msgs_per_sec=1000000", "net.ipv6.icmp.ratelimit=0",
            "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.all.accept_local=1",
        ]  # fmt: skip
        namespaces.run(self.node, ["sysctl", "-qw", *settings])
        namespaces.run(self.node, ["ip", "-batch", "-"], stdin="\n".join(batch))
        namespaces.run(self.world, ["ip", "-batch", "-"], stdin="\n".join(f"link set w-{i} up" for i in range(len(LINKS))))

    def _sniffer(self, name, link):
        with namespaces.inside(name):
            sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            sniffer.bind((link, 0))
        sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        sniffer.setblocking(False)
        return self._undo.enter_context(sniffer)

    def send(self, flow, identity):
        """Put the first packet of a flow on the wire it comes from."""
        packet = _packet(flow, identity)
        if flow.from_node:
            with contextlib.suppress(PermissionError):  # a rule of OUTPUT took it
                self._raw[flow.destination.version].sendto(bytes(packet), (str(flow.destination), 0))
            return
        link = LINKS.index(flow.interface)
        frame = Ether(src=MAC_W.format(link), dst=MAC_N.format(link)) / packet
        self._sniffers[flow.interface].send(bytes(frame))

    def collect(self, identities, seconds=3.0, quiet=0.15):
        """Return {identity: (what, destination, port, source)} until all are seen or the wires are quiet.

        ``what`` is ``out`` (left, or was delivered, to destination and port), ``refused`` (an ICMP unreachable or a reset came
        back); an identity that is missing was dropped.
        """
        found = {}
        end = time.monotonic() + seconds
        sockets = [*self._sniffers.values(), self._loopback]
        while time.monotonic() < end and set(identities) - found.keys():
            ready = select.select(sockets, [], [], quiet)[0]
            if not ready:
                break
            for one in ready:
                self._drain(one, found)
        return found

    def _drain(self, sniffer, found):
        on_loopback = sniffer is self._loopback
        while True:
            try:
                frame, address = sniffer.recvfrom(4096)
            except BlockingIOError:
                return
            if address[2] == PACKET_OUTGOING and not on_loopback:
                continue  # what we sent ourselves
            seen = _read(Ether(frame))
            if seen is not None:
                identity, event = seen
                if identity not in found or event[0] == "refused":
                    found[identity] = event


def _packet(flow, identity):
    layer = IP if flow.destination.version == 4 else IPv6
    head = layer(src=str(flow.source), dst=str(flow.destination))
    port = 1024 + identity % 60000
    match flow.protocol:
        case "TCP":
            return head / TCP(sport=port, dport=flow.port, flags="S", seq=identity)
        case "UDP":
            return head / UDP(sport=port, dport=flow.port) / Raw(MAGIC + struct.pack("!I", identity))
        case _:
            return head / SCTP(sport=port, dport=flow.port, tag=0) / SCTPChunkInit(init_tag=identity, init_tsn=1)


def _read(frame):
    """Return (identity, event) of a packet of ours, or None."""
    for layer, complaints in ((IP, (ICMP,)), (IPv6, (ICMPv6DestUnreach, ICMPv6ParamProblem))):
        if layer not in frame:
            continue
        packet = frame[layer]
        unreachable = next((c for c in complaints if c in packet), None)
        if unreachable is not None:
            identity = _quoted_identity(bytes(packet[unreachable].payload), packet.version)
            return None if identity is None else (identity, ("refused", None, 0, None))
        if TCP in packet and packet[TCP].flags & 0x04:
            return packet[TCP].ack - 1, ("refused", None, 0, None)
        identity = _identity(packet)
        if identity is None:
            return None
        transport = next(packet[t] for t in (TCP, UDP, SCTP) if t in packet)
        return identity, ("out", ip_address(packet.dst), transport.dport, ip_address(packet.src))
    return None


def _identity(packet):
    if TCP in packet and packet[TCP].flags == "S":
        return packet[TCP].seq
    if UDP in packet:
        payload = bytes(packet[UDP].payload)
        return struct.unpack("!I", payload[len(MAGIC) : len(MAGIC) + 4])[0] if payload.startswith(MAGIC) else None
    if SCTPChunkInit in packet:
        return packet[SCTPChunkInit].init_tag
    return None


def _quoted_identity(quoted, version):
    """Find the identity in the packet that an ICMP message quotes."""
    packet = IP(quoted) if version == 4 else IPv6(quoted)
    return _identity(packet)
