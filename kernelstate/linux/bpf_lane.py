"""The short lane's program in the kernel: puts it at links, finds it again, renews its generation, takes it off.

    np_lane   ingress of each pod's veth, of the uplink and of flannel's VXLAN link
      '-- lane.bpf.o   settings, links, judged: written here;   ways, visitors, counters: its own;   tables of Services: packet_tables.py

Pods' veths are known by the mark that ``nodeplane-cni`` leaves (``pod_link.py``): without a bridge, and without a queue of their own, for
what somebody shapes must go through it. What is attached stays while nobody of ours runs, and holds its maps; settings say of which build
it is. Implements ``reconcile_lane.LanePort``, for the network namespace it is called in.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from kernelstate.errors import KernelRefusedError, KernelStateError, MissingFeatureError
from kernelstate.features import Feature
from kernelstate.linux import sysctl, uplink
from kernelstate.linux.bpf_attach import Attacher, Hook, attacher
from kernelstate.linux.libbpf import BpfObject, Map, Program
from kernelstate.linux.pod_codec import IFINFO, RTM_GETLINK, links_question, read_link
from kernelstate.linux.pod_link import ALIAS
from kernelstate.linux.rtnetlink import Message, RouteSocket, attributes
from kernelstate.objects.lane import Address, LaneLink, LinkKind
from kernelstate.service_layout import MAPS as TABLES
from kernelstate.service_maps import pack_address

OBJECT, PROGRAM = "lane.bpf.o", "np_lane"
ORDER = 2
"""Behind the tunnel's program and the source guard."""
OWN = ("settings", "links", "judged", "ways", "visitors", "counters")
"""Maps that go on under another program of the same build."""
COUNTERS = ("taken", "learned", "left", "opened", "led")
"""The program's enum, in its order."""
LIBERAL = "net.netfilter.nf_conntrack_tcp_be_liberal"
"""Tracking does not see what takes the lane, and must not take what it sees next for a stranger's."""
BUILD = 8
_SETTINGS, _WORD = struct.Struct("=8sIIHBx"), struct.Struct("=I")
_ONLY = bytes(4)
_IFLA_QDISC, _IFLA_LINKINFO, _IFLA_INFO_DATA, _IFLA_VXLAN_PORT = 6, 18, 2, 15
_NO_QUEUE = b"noqueue\0"
_CLOCK_MONOTONIC_COARSE = 6
"""Its resolution is that of the kernel's jiffies: time.h."""


class _Held:
    """The program and its maps by descriptors of ours."""

    def __init__(self, program: Program, maps: Mapping[str, Map]) -> None:
        self.program, self.maps = program, maps

    def close(self) -> None:
        for one in (self.program, *self.maps.values()):
            one.close()


class LinuxLane:
    """The lane of one network namespace; ``objects`` is the folder of the object files. Raises MissingFeatureError.

    ``opens``: connections may begin in it.
    """

    def __init__(self, objects: Path, attach: Attacher | None = None, *, opens: bool = True) -> None:
        self._path, self._attach, self._opens = objects / OBJECT, attach or attacher(), opens
        try:
            self._build = hashlib.sha256(self._path.read_bytes()).digest()[:BUILD]
        except OSError as error:
            raise MissingFeatureError(Feature.SHORT_LANE, f"{self._path}: {error.strerror}") from error
        self._held: _Held | None = None
        self._tunnel = 0
        """The UDP port of the VXLAN link, as bytes of the wire read it; 0: there is none."""

    def close(self) -> None:
        """Let go of the program, which goes on."""
        if self._held is not None:
            self._held.close()
            self._held = None

    # -- LanePort ----------------------------------------------------------------------------------------------------

    def wanted(self) -> Sequence[LaneLink]:
        """Ask the kernel for its links, and for the default route."""
        found, self._tunnel = [], 0
        with contextlib.closing(RouteSocket()) as netlink:
            default = uplink.default_link(netlink)
            for message in netlink.dump(RTM_GETLINK, links_question(), "links"):
                link = read_link(message)
                queue = attributes(message.body, IFINFO.size).get(_IFLA_QDISC, b"")
                if not link.up or link.master:
                    continue
                if link.alias.startswith(f"{ALIAS}/") and link.kind == "veth" and queue == _NO_QUEUE:
                    found.append(LaneLink(link.name, link.ifindex, LinkKind.POD))
                elif link.ifindex == default or (link.kind == "vxlan" and link.name.startswith("flannel")):
                    found.append(LaneLink(link.name, link.ifindex, LinkKind.EXIT))
                    self._tunnel = _vxlan_port(message) if link.kind == "vxlan" else self._tunnel
        return sorted(found)

    def observe(self) -> Sequence[LaneLink]:
        """Compare settings, table and hooks with what they should be; two system calls a link."""
        held = self._held or self._find()
        if held is None:
            return ()
        self._held = held
        try:
            build, _, hz, tunnel, opens = _SETTINGS.unpack(held.maps["settings"][_ONLY])
            found = (build, hz, tunnel, bool(opens))
            if found != (self._build, _hz(), self._tunnel, self._opens) or sysctl.read(LIBERAL) != "1":
                return ()
            table = {_word(key): _word(value) for key, value in held.maps["links"].dump().items()}
        except KernelStateError:
            self.close()
            return ()
        there = [link for link in self._links_with(held.program) if table.get(link.index) == link.kind]
        return sorted(there) if len(there) == len(table) else ()

    def install(self, links: Sequence[LaneLink]) -> None:
        """Write the table, attach where it is missing, take off where it is not wanted."""
        held = self._hold()
        try:
            sysctl.write(LIBERAL, 1)
            table = held.maps["links"]
            wanted = {_WORD.pack(link.index): _WORD.pack(link.kind) for link in links}
            table.remove(table.dump().keys() - wanted.keys())
            table.update(wanted)
            held.maps["settings"][_ONLY] = self._next_settings(held)
            for link in links:
                self._attach.attach(_hook(link.index), held.program)
            self._sweep({link.index for link in links})
        except KernelStateError:
            self.close()
            raise

    def judge(self, addresses: Collection[Address]) -> int:
        """Write which pods' packets go by rules, whether there is a program at a link yet or not."""
        table = self._hold().maps["judged"]
        wanted = {pack_address(*address): _WORD.pack(1) for address in addresses}
        found = table.dump().keys()
        table.update({key: value for key, value in wanted.items() if key not in found})
        table.remove(found - wanted.keys())
        return len(found ^ wanted.keys())

    def renew(self) -> None:
        """Count the generation on, also of a program that is not held at the moment."""
        self._held = self._held or self._find()
        if self._held is not None:
            self._held.maps["settings"][_ONLY] = self._next_settings(self._held)

    def remove(self) -> bool:
        """Take it off every link."""
        self.close()
        return self._sweep(set())

    def counters(self) -> Mapping[str, int]:
        """Add up what each CPU has counted."""
        if self._held is None:
            return {}
        table = self._held.maps["counters"]
        return {name: sum(table.read_cpus(_WORD.pack(i))) for i, name in enumerate(COUNTERS)}

    # -- for packet_tables.py ----------------------------------------------------------------------------------------

    @property
    def tables(self) -> Mapping[str, Map] | None:
        """The maps of the program there is, by name; None if there is none."""
        self._held = self._held or self._find()
        return self._held.maps if self._held is not None else None

    def exchange(self, sizes: Mapping[str, int], fill: Callable[[Mapping[str, Map]], None]) -> None:
        """Have a program with other tables, which ``fill`` fills first, wherever there is one now. What it remembers goes on."""
        earlier = self._held or self._find()
        held = self._load(sizes, earlier)
        try:
            fill(held.maps)
            held.maps["settings"][_ONLY] = self._next_settings(held)
            for _, index in _interfaces():
                program = self._attach.find(_hook(index))
                if program is not None:
                    with program:
                        self._attach.attach(_hook(index), held.program)
        except KernelStateError:
            held.close()
            raise
        if earlier is not None:
            earlier.close()
        self._held = held

    # -- finding and loading -----------------------------------------------------------------------------------------

    def _hold(self) -> _Held:
        self._held = self._held or self._find() or self._load()
        return self._held

    def _find(self) -> _Held | None:
        """Return the program that is attached somewhere and of our build, with its maps."""
        for _, index in _interfaces():
            program = self._attach.find(_hook(index))
            if program is None:
                continue
            maps = program.maps()
            held = _Held(program, maps)
            is_shaped = {*OWN, *TABLES} <= maps.keys() and maps["settings"].value_size == _SETTINGS.size
            if is_shaped and maps["settings"][_ONLY][:BUILD] == self._build:
                return held
            held.close()
        return None

    def _load(self, sizes: Mapping[str, int] | None = None, earlier: _Held | None = None) -> _Held:
        kept = {name: earlier.maps[name] for name in OWN} if earlier is not None else None
        try:
            with BpfObject(self._path, sizes, kept) as loaded:
                return _Held(loaded.program(PROGRAM), {name: loaded.map(name) for name in (*OWN, *TABLES)})
        except KernelRefusedError as error:
            raise MissingFeatureError(Feature.SHORT_LANE, str(error)) from error

    def _next_settings(self, held: _Held) -> bytes:
        """Return the settings as they should be, of the generation after the one there is."""
        generation: int = _SETTINGS.unpack(held.maps["settings"][_ONLY])[1]
        return _SETTINGS.pack(self._build, (generation + 1) & 0xFFFFFFFF, _hz(), self._tunnel, self._opens)

    def _links_with(self, wanted: Program) -> Iterator[LaneLink]:
        """Yield the links at which the program is, with the kind that its table says."""
        assert self._held is not None
        table = {_word(key): _word(value) for key, value in self._held.maps["links"].dump().items()}
        for name, index in _interfaces():
            program = self._attach.find(_hook(index))
            if program is None:
                continue
            with program:
                if program.number == wanted.number and index in table:
                    yield LaneLink(name, index, LinkKind(table[index]))

    def _sweep(self, wanted: set[int]) -> bool:
        taken = [self._attach.detach(_hook(index)) for _, index in _interfaces() if index not in wanted]
        return any(taken)


def unloadable(objects: Path) -> str:
    """Say why this kernel does not take the program, by loading it; empty if it does."""
    try:
        with BpfObject(objects / OBJECT):
            return ""
    except KernelStateError as error:
        return str(error)


def _hook(index: int) -> Hook:
    return Hook(PROGRAM, index, "ingress", ORDER)


def _interfaces() -> list[tuple[str, int]]:
    return [(name, index) for index, name in socket.if_nameindex()]


def _word(data: bytes) -> int:
    return int(_WORD.unpack(data)[0])


def _vxlan_port(message: Message) -> int:
    info = attributes(attributes(message.body, IFINFO.size).get(_IFLA_LINKINFO, b""), 0)
    port = attributes(info.get(_IFLA_INFO_DATA, b""), 0).get(_IFLA_VXLAN_PORT, bytes(2))
    return int.from_bytes(port[:2], sys.byteorder)


def _hz() -> int:
    """Return how often a second the clock ticks by which connections time out."""
    return round(1 / time.clock_getres(_CLOCK_MONOTONIC_COARSE))
