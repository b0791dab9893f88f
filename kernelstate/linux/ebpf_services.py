"""The programs at sockets in the kernel: loads them, puts them at the node's cgroup, finds them again, reads and writes their maps.

    cgroup of the node    connect4 connect6 sendmsg4 sendmsg6 recvmsg4 recvmsg6 getpeername4 getpeername6
                               '------------ all on the same maps: services_sock.bpf.o ------------'

What is attached stays while nobody of ours runs. So an agent that starts finds programs by their names at the cgroup and maps
through the programs; settings say for which build and for which network namespace they were made. Programs are exchanged one by
one for others whose maps are full already; what sockets were told (``clients`` and the peers) goes on in the same maps.

Implements ``reconcile_ebpf.ServiceMapsPort``, for the network namespace it is made in.
"""

from __future__ import annotations

import errno
import hashlib
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from kernelstate import service_maps as codec
from kernelstate.errors import KernelRefusedError, KernelStateError, MissingFeatureError
from kernelstate.features import Feature
from kernelstate.linux import cgroups
from kernelstate.linux.cgroups import Cgroup
from kernelstate.linux.libbpf import BpfObject, Map, Program, library
from kernelstate.linux.table_maps import read_tables, write_tables
from kernelstate.service_layout import MAPS, Contents, MapWrite, Sizes

OBJECT = "services_sock.bpf.o"
HOOKS: Mapping[str, int] = {
    "np_recvmsg4": 19,
    "np_recvmsg6": 20,
    "np_getpeername4": 29,
    "np_getpeername6": 30,
    "np_sendmsg4": 14,
    "np_sendmsg6": 15,
    "np_connect4": 10,
    "np_connect6": 11,
}
"""Programs and their hooks (``enum bpf_attach_type``): the way back before the way out. All of them use ``settings``."""
KEPT = {"clients": (16, 32), "tcp_peers": (32, 20), "udp_peers": (32, 20)}
"""What is remembered of sockets: maps that go on under new programs, if key and value still have these sizes."""
SO_NETNS_COOKIE = 71
_ONLY = bytes(4)


class _Held:
    """Programs and maps by descriptors of ours."""

    def __init__(self, programs: Mapping[str, Program], maps: Mapping[str, Map]) -> None:
        self.programs, self.maps = programs, maps

    def close(self) -> None:
        for one in (*self.programs.values(), *self.maps.values()):
            one.close()


class LinuxServiceMaps:
    """The programs of one node, at ``cgroup``; ``objects`` is the folder of the object files. Raises MissingFeatureError."""

    def __init__(self, objects: Path, cgroup: Path) -> None:
        library()
        self._path, self._cgroup = objects / OBJECT, cgroup
        try:
            build = hashlib.sha256(self._path.read_bytes()).digest()[: codec.BUILD]
        except OSError as error:
            raise MissingFeatureError(Feature.SOCKET_PROGRAMS, f"{self._path}: {error.strerror}") from error
        self._settings = codec.Settings(build, netns_cookie())
        self._held: _Held | None = None

    def close(self) -> None:
        """Let go of the programs, which go on."""
        if self._held is not None:
            self._held.close()
            self._held = None

    # -- ServiceMapsPort ---------------------------------------------------------------------------------------------

    def observe(self) -> tuple[Sizes, Contents] | None:
        """Find the programs and read what they know."""
        self.close()
        held = self._find()
        if held is None:
            return None
        try:
            is_ours = set(MAPS) <= held.maps.keys() and codec.read_settings(held.maps["settings"][_ONLY]) == self._settings
            is_whole = held.programs.keys() == HOOKS.keys() and _share_maps(held.programs.values())
            if not (is_ours and is_whole):
                held.close()
                return None
            found = read_tables(held.maps)
        except KernelStateError:
            held.close()
            raise
        self._held = held
        return found

    def install(self, sizes: Sizes, writes: Sequence[MapWrite]) -> None:
        """Load, fill, then exchange program by program."""
        self.close()
        earlier = self._find()
        try:
            held = self._load(sizes, earlier)
        finally:
            if earlier is not None:
                earlier.close()
        try:
            held.maps["settings"][_ONLY] = codec.pack_settings(self._settings)
            write_tables(held.maps, writes)
            with Cgroup(self._cgroup) as cgroup:
                for name, kind in HOOKS.items():
                    cgroup.attach(kind, held.programs[name])
            self._sweep(self._cgroup)
        except KernelStateError:
            held.close()
            raise
        self._held = held

    def write(self, writes: Sequence[MapWrite]) -> None:
        """Change the maps."""
        assert self._held is not None
        write_tables(self._held.maps, writes)

    def is_intact(self) -> bool:
        """Compare what is at each hook, and the settings, with what we left: some fifty system calls."""
        if self._held is None:
            return False
        try:
            with Cgroup(self._cgroup) as cgroup:
                for name, kind in HOOKS.items():
                    program = cgroup.find(kind, name)
                    if program is None:
                        return False
                    with program:
                        if program.number != self._held.programs[name].number:
                            return False
            return self._held.maps["settings"][_ONLY] == codec.pack_settings(self._settings)
        except KernelStateError:
            return False

    def remove(self) -> bool:
        """Take this node's programs off every cgroup."""
        self.close()
        return self._sweep(None)

    def counters(self) -> Mapping[str, int]:
        """Add up what each CPU has counted."""
        if self._held is None:
            return {}
        table = self._held.maps["counters"]
        return {name: sum(table.read_cpus(struct.pack("=I", i))) for i, name in enumerate(codec.COUNTERS)}

    # -- finding and loading -----------------------------------------------------------------------------------------

    def _find(self) -> _Held | None:
        """Return programs of this node at the cgroup, and the maps of one of them."""
        with Cgroup(self._cgroup) as cgroup:
            found = {name: cgroup.find(kind, name) for name, kind in HOOKS.items()}
        programs = {name: program for name, program in found.items() if program is not None}
        if not programs:
            return None
        held = _Held(programs, {})
        maps: dict[str, Map] = {}
        for program in programs.values():
            for name, one in program.maps().items():
                if name in maps:
                    one.close()
                else:
                    maps[name] = one
        held.maps = maps
        if "settings" not in maps or not self._is_this_node(maps["settings"]):
            held.close()
            raise KernelRefusedError("use cgroup", str(self._cgroup), "it has the programs of another node")
        return held

    def _is_this_node(self, settings: Map) -> bool:
        return settings.value_size == codec.SETTINGS and codec.read_settings(settings[_ONLY]).node == self._settings.node

    def _load(self, sizes: Sizes, earlier: _Held | None) -> _Held:
        reused = {}
        for name, shape in KEPT.items():
            one = earlier.maps.get(name) if earlier is not None else None
            if one is not None and (one.key_size, one.value_size) == shape:
                reused[name] = one
        try:
            with BpfObject(self._path, msgspec.structs.asdict(sizes), reused) as loaded:
                programs = {name: loaded.program(name) for name in HOOKS}
                return _Held(programs, {name: loaded.map(name) for name in (*MAPS, *KEPT, "settings", "counters")})
        except KernelRefusedError as error:
            raise MissingFeatureError(Feature.SOCKET_PROGRAMS, str(error)) from error

    def _sweep(self, but: Path | None) -> bool:
        """Take this node's programs off all cgroups but one; whether there were any."""
        kept = but.stat().st_ino if but is not None else None
        found = False
        for path in cgroups.every():
            try:
                with Cgroup(path) as cgroup:
                    if path.stat().st_ino != kept:
                        found = self._take_off(cgroup) or found
            except (KernelRefusedError, OSError):
                if path.exists():
                    raise
        return found

    def _take_off(self, cgroup: Cgroup) -> bool:
        found = False
        for name, kind in reversed(tuple(HOOKS.items())):
            program = cgroup.find(kind, name)
            if program is None:
                continue
            with program:
                maps = program.maps()
                is_ours = "settings" in maps and self._is_this_node(maps["settings"])
                for one in maps.values():
                    one.close()
                if is_ours:
                    cgroup.detach(kind, program)
                    found = True
        return found


def node_cgroup(stated: str) -> Path:
    """Return the cgroup whose processes are this node's: the stated one, else the machine's root, if this is the machine.

    Raises MissingFeatureError where there is none, or it cannot be told.
    """
    if stated:
        if not cgroups.is_cgroup(Path(stated)):
            raise MissingFeatureError(Feature.SOCKET_PROGRAMS, f"{stated} is not a cgroup of version 2")
        return Path(stated)
    if not cgroups.is_whole_machine():
        why = "the node is a network namespace of its own, and serviceOptions.cgroup does not say which processes are its"
        raise MissingFeatureError(Feature.SOCKET_PROGRAMS, why)
    found = cgroups.mounted()
    if not found:
        raise MissingFeatureError(Feature.SOCKET_PROGRAMS, "cgroups of version 2 are not mounted")
    return found[0]


def unloadable(objects: Path) -> str:
    """Say why this kernel does not take the programs, by loading them; empty if it does."""
    try:
        with BpfObject(objects / OBJECT):
            return ""
    except KernelStateError as error:
        return str(error)


def netns_cookie() -> int:
    """Return the cookie of the calling thread's network namespace. Raises MissingFeatureError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")
        except OSError as error:
            raise MissingFeatureError(
                Feature.SOCKET_PROGRAMS, f"SO_NETNS_COOKIE: {errno.errorcode[error.errno or 0]}"
            ) from error


def _share_maps(programs: Iterable[Program]) -> bool:
    numbers: dict[str, int] = {}
    for program in programs:
        for name, one in program.maps().items():
            if numbers.setdefault(name, one.number) != one.number:
                one.close()
                return False
            one.close()
    return True
