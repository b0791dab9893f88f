"""A UDP tunnel as the forwarder takes it: words on its command line, and a line for each peer on its control socket.

    nodeplane-udp --tun flannel0 --port 8285 --local 192.168.1.1
    peer 10.244.2.0/24 192.168.1.2 8285

Meets no socket: who says it to a running forwarder is ``linux/forwarder_control.py``.
"""

from __future__ import annotations

from kernelstate.objects.tunnel import TunnelPeer, UdpTunnel

PROGRAM = "nodeplane-udp"


def forwarder_words(tunnel: UdpTunnel) -> list[str]:
    """Return what a forwarder is started with for a tunnel."""
    words = ["--tun", tunnel.link, "--port", str(tunnel.port)]
    for address in tunnel.local:
        words += ["--local", str(address)]
    return words


def peer_line(peer: TunnelPeer, port: int) -> str:
    """Return the line that sets one peer."""
    return f"peer {peer.prefix} {peer.address} {port}"


def print_tunnel(tunnel: UdpTunnel) -> str:
    """Return a section headed by the command, with the whole table; same tunnel, same bytes."""
    lines = [f"# {PROGRAM} {' '.join(forwarder_words(tunnel))}", *(peer_line(p, tunnel.port) for p in tunnel.peers)]
    return "".join(f"{line}\n" for line in lines)
