"""Trying connections: from a pod, a node or the external client to an address, many at a time.

    [{"from": "default/client" | "node:node-1" | "external",
      "to": "default/web-1"  or  "to_ip": "10.96.0.10",  "port": 80, "protocol": "TCP"}, ...]

    [{"connected": true, "answered_by": "default/web-1", "source_seen": "10.244.1.5", "ms": 0.7}, ...]      in the same order

Each probe runs in a thread that has stepped into the source's namespace, in a process that has stepped into its node's cgroup. ``connected`` says that a TCP or SCTP connection came
about, or that a datagram was answered. A pod of the lab answers with its name and the source it saw; whoever else listens may say
what he likes, then ``answered_by`` is null.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from kernelstate.linux import netns
from netnslab import names, node_cgroups
from netnslab.errors import LabInputError
from netnslab.responder import IPPROTO_SCTP
from netnslab.state import LabState

PARALLEL = 32
SECONDS = 2.0
HELLO = b"nodeplane lab probe\n"
_ANSWER = re.compile(r"([a-z0-9][-a-z0-9]*/[a-z0-9][-.a-z0-9]*) ([0-9a-f.:]+)\n?")


class Probe(msgspec.Struct, frozen=True):
    """One connection to try, resolved: from which namespace, to which address."""

    netns: str
    ip: str
    port: int
    protocol: str
    seconds: float = SECONDS
    cgroup: Path | None = None
    """Of the node whose process it is, where there is one."""


class Answer(msgspec.Struct, frozen=True):
    """What came of it. ``why`` says why nothing did, for people."""

    connected: bool
    answered_by: str | None
    source_seen: str | None
    ms: float
    why: str = ""

    def fact(self) -> dict[str, Any]:
        """Return it as `lab probe -o json` prints it."""
        return {k: getattr(self, k) for k in ("connected", "answered_by", "source_seen", "ms")}


def read_probes(text: str, source: str, state: LabState) -> list[Probe]:
    """Read a list of probes. Raises LabInputError naming the entry, the field and the value."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise LabInputError(f"{source}: is not JSON: {error}") from error
    if not isinstance(raw, list):
        raise LabInputError(f"{source}: must be a list of probes, is {json.dumps(raw)[:80]}")
    return [_read(entry, f"{source}: [{i}]", state) for i, entry in enumerate(raw)]


def _read(raw: object, at: str, state: LabState) -> Probe:
    if not isinstance(raw, dict):
        raise LabInputError(f"{at}: must be an object, is {json.dumps(raw)[:80]}")
    unknown = sorted(raw.keys() - {"from", "to", "to_ip", "port", "protocol", "timeout"})
    if unknown:
        raise LabInputError(f"{at}.{unknown[0]}: is not a field of a probe")
    if ("to" in raw) == ("to_ip" in raw):
        raise LabInputError(f"{at}: must have either to or to_ip")
    port, protocol, seconds = raw.get("port"), raw.get("protocol", "TCP"), raw.get("timeout", SECONDS)
    if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535:
        raise LabInputError(f"{at}.port: must be between 1 and 65535, is {json.dumps(port)}")
    if protocol not in {"TCP", "UDP", "SCTP"}:
        raise LabInputError(f"{at}.protocol: must be TCP, UDP or SCTP, is {json.dumps(protocol)}")
    if not isinstance(seconds, int | float) or not 0 < seconds <= 60:
        raise LabInputError(f"{at}.timeout: must be seconds, at most 60, is {json.dumps(seconds)}")
    ip = _ip(raw["to_ip"], f"{at}.to_ip") if "to_ip" in raw else _pod_ip(raw["to"], f"{at}.to", state)
    netns, node = source_of(raw.get("from"), f"{at}.from", state)
    cgroup = node_cgroups.path(state.name, node) if node else None
    return Probe(netns, ip, port, protocol, float(seconds), cgroup if cgroup is not None and cgroup.exists() else None)


def source_of(stated: object, at: str, state: LabState) -> tuple[str, str]:
    """Return the namespace of ``ns/pod``, ``node:NAME`` or ``external``, and the node it is on. Raises LabInputError."""
    if stated == names.EXTERNAL:
        return state.node_netns(names.EXTERNAL), ""
    if isinstance(stated, str):
        node = stated.removeprefix("node:")
        if stated != node and state.topology.node(node):
            return state.node_netns(node), node
        pod = state.pod(stated)
        if pod is not None:
            return pod.netns, pod.node
    raise LabInputError(f"{at}: must be a pod as namespace/name, node:NAME or external, is {json.dumps(stated)}")


def _pod_ip(stated: object, at: str, state: LabState) -> str:
    pod = state.pod(stated) if isinstance(stated, str) else None
    if pod is None:
        raise LabInputError(f"{at}: must be a pod of the lab as namespace/name, is {json.dumps(stated)}")
    return pod.ips[0]


def _ip(stated: object, at: str) -> str:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, str(stated))
        except OSError:
            continue
        return str(stated)
    raise LabInputError(f"{at}: must be an IP address, is {json.dumps(stated)}")


def run_probes(probes: list[Probe]) -> list[Answer]:
    """Try all of them, up to 32 at a time from each node; the answers are in the order of the probes."""
    groups: dict[Path | None, list[int]] = {}
    for number, probe in enumerate(probes):
        groups.setdefault(probe.cgroup, []).append(number)
    found: dict[int, Answer] = {}
    elsewhere = [(numbers, _start(cgroup, [probes[n] for n in numbers])) for cgroup, numbers in groups.items() if cgroup]
    found.update(zip(groups.get(None, ()), _run_all([probes[n] for n in groups.get(None, ())]), strict=True))
    for numbers, (pid, reading) in elsewhere:
        with os.fdopen(reading, "rb") as data:
            text = data.read()
        os.waitpid(pid, 0)
        found.update(zip(numbers, msgspec.json.decode(text, type=list[Answer]), strict=True))
    return [found[number] for number in range(len(probes))]


def _run_all(probes: list[Probe]) -> list[Answer]:
    with ThreadPoolExecutor(min(PARALLEL, len(probes)) or 1) as pool:
        return list(pool.map(_run, probes))


def _start(cgroup: Path, probes: list[Probe]) -> tuple[int, int]:
    """Start a process that runs probes inside a cgroup; return it, and where its answers are to be read."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        (cgroup / "cgroup.procs").write_text("0")
        with os.fdopen(writing, "wb") as out:
            out.write(msgspec.json.encode(_run_all(probes)))
    finally:
        os._exit(0)


def _run(probe: Probe) -> Answer:
    with netns.inside(probe.netns):
        return try_once(probe)


def try_once(probe: Probe) -> Answer:
    """Try one connection from the calling thread's namespace."""
    started = time.monotonic()
    connected, text, why = False, b"", ""
    try:
        with _socket(probe) as sock:
            sock.settimeout(probe.seconds)
            sock.connect((probe.ip, probe.port))
            connected = probe.protocol != "UDP"
            sock.sendall(HELLO)
            text = _receive(sock, probe, started + probe.seconds)
            connected = connected or bool(text)
    except TimeoutError:
        why = "no answer in time"
    except OSError as error:
        why = errno.errorcode.get(error.errno or 0, "") + f" {error.strerror}"
    found = _ANSWER.fullmatch(text.decode(errors="replace"))
    ms = round(1000 * (time.monotonic() - started), 2)
    return Answer(connected, found[1] if found else None, found[2] if found else None, ms, why)


def _socket(probe: Probe) -> socket.socket:
    family = socket.AF_INET6 if ":" in probe.ip else socket.AF_INET
    kind = socket.SOCK_DGRAM if probe.protocol == "UDP" else socket.SOCK_STREAM
    return socket.socket(family, kind, IPPROTO_SCTP if probe.protocol == "SCTP" else 0)


def _receive(sock: socket.socket, probe: Probe, end: float) -> bytes:
    """Return a datagram, or all of a stream until its end or the time is up."""
    if probe.protocol == "UDP":
        return sock.recv(2048)
    text = b""
    while not text.endswith(b"\n") and len(text) < 4096:
        sock.settimeout(max(0.01, end - time.monotonic()))
        try:
            part = sock.recv(2048)
        except TimeoutError:
            break
        if not part:
            break
        text += part
    return text


def has_sctp() -> bool:
    """Whether the kernel has SCTP."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_SCTP).close()
    except OSError:
        return False
    return True


def load(file: str, state: LabState) -> list[Probe]:
    """Read probes from a file. Raises LabInputError."""
    try:
        return read_probes(Path(file).read_text(), file, state)
    except (OSError, UnicodeDecodeError) as error:
        raise LabInputError(f"{file}: {error}") from error
