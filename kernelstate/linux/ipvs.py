"""IPVS over generic netlink: virtual servers and real servers to and from its attributes, and doing it.

    NEW/SET/DEL_SERVICE   IPVS_CMD_ATTR_SERVICE { AF, PROTOCOL, ADDR, PORT | SCHED_NAME, FLAGS, TIMEOUT, NETMASK }
    NEW/SET/DEL_DEST      the same up to PORT, and IPVS_CMD_ATTR_DEST { ADDR_FAMILY, ADDR, PORT, FWD_METHOD, WEIGHT, thresholds }

Implements ``reconcile_ipvs.IpvsPort``; decides nothing. Addresses take 16 bytes, an IPv4 address the first four; ports are in
network order, all else in the machine's. Attributes of fixed size are packed in one go: a node may have forty thousand.

Source: include/uapi/linux/ip_vs.h, net/netfilter/ipvs/ip_vs_ctl.c (ip_vs_genl_parse_service, _parse_dest; num_services counts
IPv4 only).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import subprocess
from collections.abc import Collection, Sequence

from kernelstate.diff_ipvs import IpvsChange
from kernelstate.errors import KernelRefusedError, KernelStateError, MissingFeatureError
from kernelstate.features import Feature
from kernelstate.linux.generic_netlink import GenericSocket
from kernelstate.linux.rtnetlink import attribute, attributes, number, to_int
from kernelstate.objects.ipvs import IpvsProtocol, RealServer, ServerKey, VirtualServer
from kernelstate.reconcile_ipvs import SeenReal

FAMILY, VERSION = "IPVS", 1
MODPROBE_SECONDS = 30.0
NEW_SERVICE, SET_SERVICE, DEL_SERVICE, GET_SERVICE, NEW_DEST, SET_DEST, DEL_DEST, GET_DEST = range(1, 9)
SET_CONFIG, GET_CONFIG, GET_INFO = 12, 13, 15
ATTR_SERVICE, ATTR_DEST = 1, 2
TIMEOUT_TCP, TIMEOUT_TCP_FIN, TIMEOUT_UDP = 4, 5, 6
SVC_AF, SVC_PROTOCOL, SVC_ADDR, SVC_PORT, SVC_SCHED, SVC_FLAGS, SVC_TIMEOUT, SVC_NETMASK, SVC_PE = 1, 2, 3, 4, 6, 7, 8, 9, 11
SVC_FWMARK = 5
DEST_ADDR, DEST_PORT, DEST_FWD, DEST_WEIGHT, DEST_U_THRESH, DEST_L_THRESH = range(1, 7)
DEST_ACTIVE, DEST_INACTIVE, DEST_FAMILY = 7, 8, 11
F_PERSISTENT, F_HASHED, F_BY_PORT = 0x1, 0x2, 0x10
"""IP_VS_SVC_F_PERSISTENT, _HASHED (the kernel's own), _SCHED2: ``sh-port`` and ``mh-port``."""
FWD_MASK, FWD_NAT, FWD_LOCAL = 0x7, 0, 1
SO_GET_INFO = 64 + 1024 + 64 + 1
NESTED = 0x8000

AF = {4: socket.AF_INET, 6: socket.AF_INET6}
PROTOCOLS: dict[IpvsProtocol, int] = {"tcp": 6, "udp": 17, "sctp": 132}
_NAMES = {number: name for name, number in PROTOCOLS.items()}
_KEY = struct.Struct("=HHH2x HHH2x HH16s HH2s2x".replace(" ", ""))
_DEST_KEY = struct.Struct("=HH HHH2x HH16s HH2s2x".replace(" ", ""))
_DEST = struct.Struct("=HH HHH2x HH16s HH2s2x HHI HHI HHI HHI".replace(" ", ""))
_NEST = struct.Struct("=HH")
_U32 = struct.Struct("=I")

Raw = tuple[int, bytes]


# -- to the kernel ---------------------------------------------------------------------------------------------------


def key_attributes(key: ServerKey) -> bytes:
    """Encode what identifies a virtual server, without the attribute around it."""
    family, protocol, address, port = key
    packed = address.to_bytes(4, "big") if family == 4 else address.to_bytes(16, "big")
    return _KEY.pack(
        6, SVC_AF, AF[family], 6, SVC_PROTOCOL, PROTOCOLS[protocol], 20, SVC_ADDR, packed, 6, SVC_PORT, port.to_bytes(2, "big")
    )  # fmt: skip


def key_payload(key: ServerKey) -> bytes:
    """Encode a virtual server's identity as requests about it need it."""
    inner = key_attributes(key)
    return _NEST.pack(4 + len(inner), ATTR_SERVICE | NESTED) + inner


def server_payload(key: ServerKey, server: VirtualServer) -> bytes:
    """Encode a virtual server in full. All flags are set as given (mask), and persistence is per client address."""
    flags = (F_PERSISTENT if server.timeout else 0) | (F_BY_PORT if server.by_port else 0)
    netmask = b"\xff\xff\xff\xff" if key.family == 4 else _U32.pack(128)  # of IPv6 it is a prefix length
    inner = (
        key_attributes(key)
        + attribute(SVC_SCHED, server.scheduler.encode() + b"\0")
        + attribute(SVC_FLAGS, struct.pack("=II", flags, 0xFFFFFFFF))
        + number(SVC_TIMEOUT, server.timeout)
        + attribute(SVC_NETMASK, netmask)
    )
    return _NEST.pack(4 + len(inner), ATTR_SERVICE | NESTED) + inner


def real_payload(key: ServerKey, real: RealServer) -> bytes:
    """Encode a real server in full, without the virtual server before it: masqueraded, no thresholds."""
    family = key.family
    address, port, weight = real
    packed = address.to_bytes(4, "big") if family == 4 else address.to_bytes(16, "big")
    return _DEST.pack(
        _DEST.size, ATTR_DEST | NESTED, 6, DEST_FAMILY, AF[family], 20, DEST_ADDR, packed, 6, DEST_PORT, port.to_bytes(2, "big"),
        8, DEST_FWD, FWD_NAT, 8, DEST_WEIGHT, weight, 8, DEST_U_THRESH, 0, 8, DEST_L_THRESH, 0,
    )  # fmt: skip


def requests_of(changes: Sequence[IpvsChange]) -> list[Raw]:
    """Encode changes, each as one request (command, attributes)."""
    requests: list[Raw] = []
    last: ServerKey | None = None
    payload = b""
    for verb, key, server, real in changes:
        if key is not last:
            last, payload = key, key_payload(key)
        if real is not None:
            requests.append((_REAL_COMMANDS[verb], payload + real_payload(key, real)))
        elif server is not None:
            requests.append((NEW_SERVICE if verb == "add server" else SET_SERVICE, server_payload(key, server)))
        else:
            requests.append((DEL_SERVICE, payload))
    return requests


_REAL_COMMANDS = {"add real": NEW_DEST, "set real": SET_DEST, "delete real": DEL_DEST}


# -- from the kernel -------------------------------------------------------------------------------------------------


def read_server(message: bytes) -> tuple[ServerKey, VirtualServer] | None:
    """Read a virtual server, still without real servers; None for one of a kind we never make (by firewall mark).

    What we never set, but somebody did, becomes part of the scheduler's name: it equals nothing that is desired.
    """
    found = attributes(attributes(message, 0).get(ATTR_SERVICE, b""), 0)
    protocol = _NAMES.get(to_int(found.get(SVC_PROTOCOL, b"")))
    if SVC_FWMARK in found or protocol is None:
        return None
    family, size = (4, 4) if to_int(found[SVC_AF]) == socket.AF_INET else (6, 16)
    address = int.from_bytes(found[SVC_ADDR][:size], "big")
    key = ServerKey(family, protocol, address, int.from_bytes(found[SVC_PORT], "big"))  # type: ignore[arg-type]
    flags = _U32.unpack_from(found[SVC_FLAGS])[0]
    scheduler = found.get(SVC_SCHED, b"").rstrip(b"\0").decode()
    unknown = flags & ~(F_PERSISTENT | F_HASHED | F_BY_PORT)
    narrow = flags & F_PERSISTENT and found[SVC_NETMASK] not in {b"\xff\xff\xff\xff", _U32.pack(128)}
    engine = found.get(SVC_PE, b"").rstrip(b"\0").decode()
    if unknown or narrow or engine:
        scheduler += f" flags {flags:#x} netmask {found[SVC_NETMASK].hex()} pe {engine or 'none'}"
    timeout = to_int(found.get(SVC_TIMEOUT, b"")) if flags & F_PERSISTENT else 0
    return key, VirtualServer(scheduler, (), timeout, bool(flags & F_BY_PORT))


def read_real(message: bytes, size: int) -> SeenReal:
    """Read a real server with its connections; ``size`` is an address's, in bytes.

    One that is not masqueraded gets weight -1, which equals nothing that is desired.
    """
    found = attributes(attributes(message, 0).get(ATTR_DEST, b""), 0)
    masqueraded = to_int(found[DEST_FWD]) & FWD_MASK in {FWD_NAT, FWD_LOCAL}
    return SeenReal(
        int.from_bytes(found[DEST_ADDR][:size], "big"),
        int.from_bytes(found[DEST_PORT], "big"),
        to_int(found[DEST_WEIGHT]) if masqueraded else -1,
        to_int(found[DEST_ACTIVE]),
        to_int(found[DEST_INACTIVE]),
    )


class LinuxIpvs:
    """IPVS of the network namespace it is made in. Raises MissingFeatureError where the kernel has none."""

    def __init__(self) -> None:
        try:
            self._socket = GenericSocket(FAMILY, VERSION)
        except MissingFeatureError as error:
            raise MissingFeatureError(Feature.IPVS, error.detail) from error
        self._counter = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)

    def close(self) -> None:
        """Close its sockets; the kernel keeps everything."""
        self._socket.close()
        self._counter.close()

    def servers(self) -> dict[ServerKey, VirtualServer]:
        """Return every virtual server, whoever made it, without its real servers."""
        found = (read_server(message) for message in self._socket.dump(GET_SERVICE, b"", "virtual servers"))
        return dict(pair for pair in found if pair is not None)

    def real_servers(self, key: ServerKey) -> list[SeenReal]:
        """Return the real servers of one virtual server; none if there is no such virtual server."""
        size = 4 if key.family == 4 else 16
        return [read_real(message, size) for message in self._socket.dump(GET_DEST, key_payload(key), "real servers")]

    def read(self, keys: Collection[ServerKey]) -> dict[ServerKey, VirtualServer]:
        """Return these virtual servers, without real servers, as far as they exist."""
        found: dict[ServerKey, VirtualServer] = {}
        for answer in self._socket.get([(GET_SERVICE, key_payload(key)) for key in keys]):
            if isinstance(answer, bytes):
                seen = read_server(answer)
                found.update([seen] if seen else [])
            elif answer != errno.ESRCH:
                raise KernelRefusedError("look up", "virtual server", os.strerror(answer))
        return found

    def count(self) -> int:
        """Return how many IPv4 virtual servers there are, whoever made them; one system call."""
        try:
            return int(struct.unpack("=III", self._counter.getsockopt(socket.IPPROTO_IP, SO_GET_INFO, 12))[2])
        except OSError as error:
            raise KernelRefusedError("count", "virtual servers", str(error.strerror)) from error

    def apply(self, changes: Sequence[IpvsChange]) -> list[str]:
        """Do each, in order, going on after failures; return the kernel's words for each, empty for done."""
        codes = self._socket.execute(requests_of(changes))
        return [_judged(change, code) if code else "" for change, code in zip(changes, codes, strict=True)]

    def timeouts(self) -> tuple[int, int, int]:
        """Return how long an idle entry lives, in seconds: TCP, TCP after FIN, UDP."""
        answer = self._socket.get([(GET_CONFIG, b"")])[0]
        if isinstance(answer, int):
            raise KernelRefusedError("read", "IPVS timeouts", os.strerror(answer))
        found = attributes(answer, 0)
        return to_int(found[TIMEOUT_TCP]), to_int(found[TIMEOUT_TCP_FIN]), to_int(found[TIMEOUT_UDP])

    def set_timeouts(self, tcp: int, tcp_fin: int, udp: int) -> None:
        """Set the timeouts, in seconds; 0 leaves one as it is."""
        wanted = [(TIMEOUT_TCP, tcp), (TIMEOUT_TCP_FIN, tcp_fin), (TIMEOUT_UDP, udp)]
        payload = b"".join(number(kind, seconds) for kind, seconds in wanted if seconds)
        code = self._socket.execute([(SET_CONFIG, payload)])[0] if payload else 0
        if code:
            raise KernelRefusedError("set", f"IPVS timeouts {tcp} {tcp_fin} {udp}", os.strerror(code))


def has_ipvs() -> bool:
    """Whether this kernel has IPVS, or a module of it that can be loaded: asked, not guessed."""
    try:
        LinuxIpvs().close()
    except KernelStateError:
        return False
    return True


def load_scheduler(name: str) -> None:
    """Load a scheduler's module if it is one; whether the kernel has the scheduler is told when it is asked for.

    Left to itself IPVS loads it while holding its own lock. Modules that keep something for each network namespace (``lblc``,
    ``lblcr``) then wait for a namespace that is just being taken down, and that waits for IPVS' lock: seen with Linux 6.1.
    """
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(["modprobe", "-q", f"ip_vs_{name}"], check=False, capture_output=True, timeout=MODPROBE_SECONDS)


def _judged(change: IpvsChange, code: int) -> str:
    """Return the kernel's words; deleting what is gone is success."""
    if change.verb.startswith("delete") and code in {errno.ESRCH, errno.ENOENT}:
        return ""
    if code == errno.ENOENT and change.server is not None:
        return f"no scheduler {change.server.scheduler} in this kernel"
    return os.strerror(code)
