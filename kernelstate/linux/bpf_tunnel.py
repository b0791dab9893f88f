"""The tunnel's programs in the kernel: puts them where they belong, finds them again, fills their tables, takes them off.

    np_udp_encap    egress of flannel0      --.
    np_udp_decap    ingress of the uplink     +-- udp.bpf.o: places, nodes, counters, settings
    np_udp_arrive   ingress of flannel0-in  --'   (merge_pair.py; where packets have frames)
    np_guard        ingress of the uplink   ----- guard.bpf.o: the same four, of its own

What is attached stays while nobody of ours runs, and holds its maps. So an agent that starts finds programs by their names at the
hooks, and maps through the programs; settings name the build they were written for. A program of another build is exchanged for
ours once our tables are filled: no packet meets an empty one.

Implements ``reconcile_tunnel.TunnelPort``, for the network namespace it is called in.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from kernelstate.errors import KernelRefusedError, KernelStateError, MissingFeatureError
from kernelstate.features import Feature
from kernelstate.linux import ethtool, merge_pair
from kernelstate.linux import tunnel_maps as codec
from kernelstate.linux.bpf_attach import Attacher, Hook, attacher
from kernelstate.linux.libbpf import BpfObject, Map, Program
from kernelstate.objects.tunnel import Place, SourceGuard, UdpTunnel
from kernelstate.reconcile_tunnel import Observed
from kernelstate.tunnel_tables import Kind, Part, TableChange, diff_tables

MAPS = ("places", "nodes", "counters", "settings")
ENCAP, DECAP, ARRIVE, GUARD = "np_udp_encap", "np_udp_decap", "np_udp_arrive", "np_guard"
PROGRAMS: Mapping[Kind, tuple[str, ...]] = {"udp": (ENCAP, DECAP, ARRIVE), "guard": (GUARD,)}
SIOCGIFHWADDR, ARPHRD_ETHER = 0x8927, 1
_IFREQ = struct.Struct("16sH22x")
_ONLY = bytes(4)
"""The key of the only element of an array."""


class _Programs:
    """One kind's programs and maps by descriptors of ours, and what we know to be in the maps."""

    def __init__(self, programs: Mapping[str, Program], maps: Mapping[str, Map]) -> None:
        self.programs, self.maps = programs, maps
        self.hooks: tuple[Hook, ...] = ()
        self.settings = b""
        self.places: dict[bytes, bytes] = {}
        self.nodes: frozenset[bytes] = frozenset()

    def close(self) -> None:
        """Let go of the descriptors."""
        for one in (*self.programs.values(), *self.maps.values()):
            one.close()

    def read(self) -> None:
        """Learn what is in the tables."""
        self.places = self.maps["places"].dump()
        self.nodes = frozenset(self.maps["nodes"].dump())

    def is_as_known(self) -> bool:
        """Whether settings and tables are what we know them to be."""
        return (
            self.maps["settings"][_ONLY] == self.settings
            and self.maps["places"].dump() == self.places
            and self.maps["nodes"].dump().keys() == self.nodes
        )

    def write(self, changes: Sequence[TableChange]) -> None:
        """Change the tables, in the order in which the changes come: nodes, places, then what is gone."""
        for gone in (False, True):
            entries = [change.entry for change in changes if change.gone is gone]
            places = codec.pack_places(e for e in entries if isinstance(e, Place))
            nodes = [codec.pack_address(e) for e in entries if not isinstance(e, Place)]
            if gone:
                self.maps["places"].remove(places)
                self.places = {key: value for key, value in self.places.items() if key not in places}
                self.maps["nodes"].remove(nodes)
                self.nodes -= frozenset(nodes)
            else:
                self.maps["nodes"].update(dict.fromkeys(nodes, codec.NODE))
                self.nodes |= frozenset(nodes)
                self.maps["places"].update(places)
                self.places |= places


class LinuxTunnel:
    """The programs of the network namespace it is called in; ``objects`` is the folder of the object files."""

    def __init__(self, objects: Path, attach: Attacher | None = None) -> None:
        """``attach``: instead of the better way that this kernel has. Raises MissingFeatureError without libbpf."""
        self._objects, self._attach = objects, attach or attacher()
        self._held: dict[Kind, _Programs] = {}
        self._builds: dict[Kind, bytes] = {}
        """What the object files hash to; they change with an upgrade, which is another process."""

    def close(self) -> None:
        """Let go of the programs, which go on."""
        for held in self._held.values():
            held.close()
        self._held.clear()

    # -- TunnelPort --------------------------------------------------------------------------------------------------

    def observe(self, kind: Kind) -> Observed | None:
        """Find the programs and read what they were given; None unless they are those that ``install`` would leave."""
        self._let_go(kind)
        held = self._find(kind)
        if held is None:
            return None
        settings = held.maps["settings"][_ONLY]
        arguments = _arguments(kind, settings)
        try:
            hooks = _hooks(arguments) if arguments is not None else ()
            right = arguments is not None and settings == self._settings(arguments) and self._are_at(held, hooks)
        except KernelStateError:
            right = False
        if not right or arguments is None:
            held.close()
            return None
        held.hooks, held.settings = hooks, settings
        held.read()
        self._held[kind] = held
        return Observed(arguments, codec.read_tables(held.places, held.nodes))

    def install(self, kind: Kind, wanted: Observed) -> None:
        """Fill tables, write settings, then let the programs see packets; those elsewhere are taken off."""
        self._let_go(kind)
        arguments = wanted.arguments
        if isinstance(arguments, UdpTunnel) and _uplink(arguments.uplink).has_frames and 0 in merge_pair.find(arguments.link):
            with contextlib.suppress(KernelRefusedError):  # without the pair segments stay single, and all else works
                merge_pair.make(arguments.link)
        hooks, settings = _hooks(arguments), self._settings(arguments)
        held = self._find(kind)
        if held is None or any(hook.program not in held.programs for hook in hooks):
            if held is not None:
                held.close()
            held = self._load(kind)
        try:
            held.read()
            held.write(diff_tables(wanted.tables, codec.read_tables(held.places, held.nodes)))
            held.maps["settings"][_ONLY] = settings
            for hook in hooks:
                self._attach.attach(hook, held.programs[hook.program])
            self._sweep(kind, hooks)
        except KernelStateError:
            held.close()
            raise
        held.hooks, held.settings = hooks, settings
        self._held[kind] = held

    def write(self, kind: Kind, changes: Sequence[TableChange]) -> None:
        """Change the tables."""
        self._held[kind].write(changes)

    def is_intact(self, kind: Kind) -> bool:
        """Compare hooks, links, settings and tables with what we left; some ten system calls, and one for 4,096 places."""
        held = self._held.get(kind)
        if held is None:
            return False
        try:
            arguments = _arguments(kind, held.settings)
            return (
                arguments is not None
                and _hooks(arguments) == held.hooks
                and self._settings(arguments) == held.settings
                and self._are_at(held, held.hooks)
                and held.is_as_known()
            )
        except KernelStateError:
            return False

    def remove(self, kind: Kind) -> bool:
        """Take the programs of a kind off every link, and the tunnel's pair of links with them."""
        self._let_go(kind)
        found = self._sweep(kind, ())
        if kind == "udp":
            for _, name in socket.if_nameindex():
                if name.endswith("-out") and all(merge_pair.find(name.removesuffix("-out"))):
                    with contextlib.suppress(KernelRefusedError):  # somebody else's
                        found = merge_pair.remove(name.removesuffix("-out")) or found
        return found

    def counters(self, kind: Kind) -> Mapping[str, int]:
        """Add up what each CPU has counted."""
        held = self._held.get(kind)
        if held is None:
            return {}
        table = held.maps["counters"]
        return {name: sum(table.read_cpus(struct.pack("=I", i))) for i, name in enumerate(codec.COUNTERS[kind])}

    # -- finding and loading -----------------------------------------------------------------------------------------

    def _find(self, kind: Kind) -> _Programs | None:
        """Return programs of our build that are attached somewhere, all on the same maps; None if there are none."""
        programs: dict[str, Program] = {}
        for hook in _possible_hooks(kind):
            if hook.program not in programs and (program := self._attach.find(hook)) is not None:
                programs[hook.program] = program
        maps = [program.maps() for program in programs.values()]
        found = _Programs(programs, maps[0] if maps else {})
        numbers = [{name: one.number for name, one in each.items()} for each in maps]
        for other in maps[1:]:
            for one in other.values():
                one.close()
        whole = programs.keys() >= set(PROGRAMS[kind]) - {ARRIVE} and all(n.items() <= numbers[0].items() for n in numbers)
        if whole and set(MAPS) <= found.maps.keys() and codec.read_build(found.maps["settings"][_ONLY]) == self._build(kind):
            return found
        found.close()
        return None

    def _load(self, kind: Kind) -> _Programs:
        """Load the programs, with empty tables. Raises MissingFeatureError where the kernel does not take them."""
        path = self._objects / f"{kind}.bpf.o"
        try:
            with BpfObject(path) as loaded:
                programs = {name: loaded.program(name) for name in PROGRAMS[kind]}
                return _Programs(programs, {name: loaded.map(name) for name in MAPS})
        except KernelRefusedError as error:
            raise MissingFeatureError(_feature(kind), str(error)) from error

    def _build(self, kind: Kind) -> bytes:
        if kind not in self._builds:
            path = self._objects / f"{kind}.bpf.o"
            try:
                self._builds[kind] = hashlib.sha256(path.read_bytes()).digest()[: codec.BUILD]
            except OSError as error:
                raise MissingFeatureError(_feature(kind), f"{path}: {error.strerror}") from error
        return self._builds[kind]

    def _let_go(self, kind: Kind) -> None:
        held = self._held.pop(kind, None)
        if held is not None:
            held.close()

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _are_at(self, held: _Programs, hooks: Sequence[Hook]) -> bool:
        """Whether each hook has the program that is held."""
        for hook in hooks:
            program = self._attach.find(hook)
            if program is None:
                return False
            with program:
                if program.number != held.programs[hook.program].number:
                    return False
        return True

    def _sweep(self, kind: Kind, wanted: Sequence[Hook]) -> bool:
        """Take programs of a kind off all hooks but the wanted ones; whether there were any."""
        taken = [self._attach.detach(hook) for hook in _possible_hooks(kind) if hook not in wanted]
        return any(taken)

    def _settings(self, arguments: Part) -> bytes:
        """Return the settings as they should be, links being as they are now. Raises KernelRefusedError."""
        uplink = _uplink(arguments.uplink)
        if isinstance(arguments, UdpTunnel):
            merge = merge_pair.find(arguments.link)[0] if uplink.has_frames else 0
            links = codec.UdpLinks(uplink, _index(arguments.link), merge, _finishes(arguments.uplink))
            return codec.pack_udp(self._build("udp"), arguments, links)
        try:
            return codec.pack_guard(self._build("guard"), arguments, uplink)
        except ValueError as error:
            raise KernelRefusedError("set up", "source guard", str(error)) from error


def missing(objects: Path, kind: Kind = "udp") -> str:
    """Say why programs of a kind cannot be in this kernel, by loading them; empty if they can."""
    try:
        with BpfObject(objects / f"{kind}.bpf.o"):
            return ""
    except KernelStateError as error:
        return str(error)


def _feature(kind: Kind) -> Feature:
    return Feature.TUNNEL_PROGRAMS if kind == "udp" else Feature.SOURCE_GUARD


def _hooks(arguments: Part) -> tuple[Hook, ...]:
    """Return where the programs belong. Raises KernelRefusedError for a link that is not there."""
    uplink = _uplink(arguments.uplink)
    if isinstance(arguments, SourceGuard):
        return (Hook(GUARD, uplink.index, "ingress", 1),)
    leave = merge_pair.find(arguments.link)[1] if uplink.has_frames else 0
    arrive = (Hook(ARRIVE, leave, "ingress"),) if leave else ()
    return (*arrive, Hook(ENCAP, _index(arguments.link), "egress"), Hook(DECAP, uplink.index, "ingress"))


def _possible_hooks(kind: Kind) -> list[Hook]:
    """Return every hook at which a program of a kind may be."""
    interfaces = [index for index, _ in socket.if_nameindex()]
    if kind == "guard":
        return [Hook(GUARD, i, "ingress", 1) for i in interfaces]
    ways = ((ENCAP, "egress"), (DECAP, "ingress"), (ARRIVE, "ingress"))
    return [Hook(program, i, direction) for program, direction in ways for i in interfaces]  # type: ignore[arg-type]


def _arguments(kind: Kind, settings: bytes) -> Part | None:
    """Return the part that settings were written for; None if its links are not there any more."""
    try:
        if kind == "udp":
            up, tunnel, port, local = codec.read_udp(settings)
            return UdpTunnel(socket.if_indextoname(tunnel), socket.if_indextoname(up), port, local, ())
        up, vxlan = codec.read_guard(settings)
        return SourceGuard(socket.if_indextoname(up), (), (), vxlan, ())
    except OSError:
        return None


def _index(link: str) -> int:
    try:
        return socket.if_nametoindex(link)
    except OSError as error:
        raise KernelRefusedError("find link", link, os.strerror(error.errno or 0)) from error


def _uplink(link: str) -> codec.Uplink:
    index = _index(link)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, SIOCGIFHWADDR, _IFREQ.pack(link.encode(), 0))
    return codec.Uplink(index, _IFREQ.unpack(answer)[1] == ARPHRD_ETHER)


def _finishes(link: str) -> bool:
    """Whether the kernel completes checksums before this link."""
    try:
        return not ethtool.tx_checksum(link)
    except OSError:
        return False
