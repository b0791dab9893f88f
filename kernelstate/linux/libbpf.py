"""BPF objects through the system's libbpf by ctypes: loading, finding again, maps, and running a program by hand.

    object file --libbpf--> programs --hold--> maps
                               ^                 ^
          whoever they are attached to holds     '-- by their numbers, from the program: nothing has to be pinned to be found again

Knows descriptors and bytes; where a program is attached is for ``bpf_attach.py``, what it does for its callers. Nothing here
depends on a network namespace, except a program that is run by hand. Source: libbpf 1.1 bpf.h and libbpf.h,
include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from kernelstate.errors import KernelRefusedError, MissingFeatureError

BPF_ANY = 0
BATCH = 4096
"""Elements that one system call reads or writes."""
INFO_BYTES = 256
"""More than any info struct of today's kernels; they fill what they know."""
NAME = 16
MOST_MAPS = 16
_MAP_NAME_AT, _PROGRAM_NAME_AT = 24, 64
"""Bytes into struct bpf_map_info and struct bpf_prog_info."""
_MAP_NUMBERS, _MAP_NUMBERS_AT = struct.Struct("=IQ"), 52  # nr_map_ids, map_ids


class Options(ctypes.Structure):
    """One of libbpf's option structs, whose first field is their size."""

    def __init__(self, **values: Any) -> None:
        super().__init__(sz=ctypes.sizeof(self), **values)


class _BatchOptions(Options):
    _fields_ = (("sz", ctypes.c_size_t), ("elem_flags", ctypes.c_uint64), ("flags", ctypes.c_uint64))


class RunOptions(Options):
    """libbpf's ``struct bpf_test_run_opts``."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_char_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_char_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


class Ran(msgspec.Struct, frozen=True):
    """What a program did with a packet: its verdict, the packet as it left it, and nanoseconds a run."""

    verdict: int
    packet: bytes
    duration: int


class Descriptor:
    """A program, map or link by its file descriptor, closed with ``close`` or at the end of a ``with``."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd, self.name = fd, name

    def close(self) -> None:
        """Let go; what is pinned or attached elsewhere stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def info(self) -> bytes:
        """Return the kernel's info struct of its kind. Raises KernelRefusedError."""
        buffer, length = ctypes.create_string_buffer(INFO_BYTES), ctypes.c_uint32(INFO_BYTES)
        check(library().bpf_obj_get_info_by_fd(self.fd, buffer, ctypes.byref(length)), "look at", self.name)
        return buffer.raw


class Program(Descriptor):
    """A loaded program; its name is the C function's."""

    @functools.cached_property
    def number(self) -> int:
        """The kernel's number for it: ``bpftool prog show id``."""
        return int(struct.unpack_from("=II", self.info())[1])

    def maps(self) -> dict[str, Map]:
        """Return the maps that it uses, by name; the caller closes them. Raises KernelRefusedError."""
        numbers = (ctypes.c_uint32 * MOST_MAPS)()
        buffer = ctypes.create_string_buffer(INFO_BYTES)
        _MAP_NUMBERS.pack_into(buffer, _MAP_NUMBERS_AT, MOST_MAPS, ctypes.addressof(numbers))
        length = ctypes.c_uint32(INFO_BYTES)
        check(library().bpf_obj_get_info_by_fd(self.fd, buffer, ctypes.byref(length)), "look at", self.name)
        count = min(_MAP_NUMBERS.unpack_from(buffer, _MAP_NUMBERS_AT)[0], MOST_MAPS)
        found = (_by_number(library().bpf_map_get_fd_by_id, number) for number in numbers[:count])
        maps = [Map(fd, "") for fd in found if fd is not None]
        return {one.name: one for one in maps}

    def run(self, packet: bytes, repeat: int = 1) -> Ran:
        """Let it look at a packet (at least an Ethernet header, 14 bytes). Raises KernelRefusedError."""
        out = ctypes.create_string_buffer(len(packet) + 256)
        options = RunOptions(data_in=packet, data_size_in=len(packet), repeat=repeat)
        options.data_out, options.data_size_out = ctypes.cast(out, ctypes.c_void_p), len(out)
        check(library().bpf_prog_test_run_opts(self.fd, ctypes.byref(options)), "run", self.name)
        return Ran(options.retval, out.raw[: options.data_size_out], options.duration)


class Map(Descriptor):
    """A map; keys and values are bytes of the sizes its C types have."""

    def __init__(self, fd: int, name: str) -> None:
        """``name`` empty: the kernel's, of which it keeps 15 characters."""
        super().__init__(fd, name)
        info = self.info()
        _, self.number, self.key_size, self.value_size, self.entries = struct.unpack_from("=5I", info)
        self.name = name or _text(info, _MAP_NAME_AT)

    def __setitem__(self, key: bytes, value: bytes) -> None:
        check(library().bpf_map_update_elem(self.fd, key, value, ctypes.c_uint64(BPF_ANY)), "write map", self.name)

    def __getitem__(self, key: bytes) -> bytes:
        """Return the value; of a per-CPU map with ``read_cpus``. Raises KernelRefusedError, also if there is none."""
        value = ctypes.create_string_buffer(self.value_size)
        check(library().bpf_map_lookup_elem(self.fd, key, value), "read map", self.name)
        return value.raw

    def read_cpus(self, key: bytes) -> tuple[int, ...]:
        """Return each CPU's 64-bit number of a per-CPU map."""
        value = (ctypes.c_uint64 * library().libbpf_num_possible_cpus())()
        check(library().bpf_map_lookup_elem(self.fd, key, value), "read map", self.name)
        return tuple(value)

    def update(self, entries: Mapping[bytes, bytes]) -> None:
        """Add and replace. Raises KernelRefusedError; some may then be written."""
        all_keys, all_values = b"".join(entries), b"".join(entries.values())
        for start in range(0, len(entries), BATCH):
            end = min(start + BATCH, len(entries))
            keys = all_keys[start * self.key_size : end * self.key_size]
            values = all_values[start * self.value_size : end * self.value_size]
            number = ctypes.c_uint32(end - start)
            done = library().bpf_map_update_batch(self.fd, keys, values, ctypes.byref(number), ctypes.byref(_BatchOptions()))
            check(done, "write map", self.name)

    def remove(self, keys: Iterable[bytes]) -> None:
        """Delete; what is gone already is success. Raises KernelRefusedError."""
        for key in keys:
            done = library().bpf_map_delete_elem(self.fd, key)
            if done != -errno.ENOENT:
                check(done, "delete from map", self.name)

    def dump(self, most: int | None = None) -> dict[bytes, bytes]:
        """Return everything, or at least the first ``most`` elements of an array. Raises KernelRefusedError."""
        found: dict[bytes, bytes] = {}
        size = BATCH
        place, is_first, done = ctypes.create_string_buffer(max(self.key_size, 4)), True, 0
        while done == 0 and (most is None or len(found) < most):
            keys, values = (
                ctypes.create_string_buffer(size * self.key_size),
                ctypes.create_string_buffer(size * self.value_size),
            )
            number = ctypes.c_uint32(size)
            done = library().bpf_map_lookup_batch(
                self.fd, None if is_first else place, place, keys, values, ctypes.byref(number), ctypes.byref(_BatchOptions())
            )
            if done == -errno.ENOSPC:  # a hash bucket has more than fits
                size, done = 2 * size, 0
                continue
            if done != -errno.ENOENT:  # which is the end
                check(done, "read map", self.name)
            found.update(
                zip(_cut(keys.raw, self.key_size, number.value), _cut(values.raw, self.value_size, number.value), strict=True)
            )
            is_first = False
        return found


def _cut(data: bytes, size: int, count: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, count * size, size))


class BpfObject:
    """An object file, loaded; ``with`` unloads it. Raises MissingFeatureError without libbpf, KernelRefusedError when refused."""

    def __init__(self, path: Path, sizes: Mapping[str, int] | None = None, reused: Mapping[str, Map] | None = None) -> None:
        """``sizes``: how many entries maps shall have, by name; ``reused``: maps there are already that programs shall use."""
        self._lib = library()
        self.name = path.name
        self._object = self._lib.bpf_object__open_file(os.fsencode(path), None)
        if not self._object:
            raise KernelRefusedError("open BPF object", str(path), os.strerror(ctypes.get_errno()))
        try:
            for name, entries in (sizes or {}).items():
                check(self._lib.bpf_map__set_max_entries(self._map(name), entries), "size map", name)
            for name, one in (reused or {}).items():
                check(self._lib.bpf_map__reuse_fd(self._map(name), one.fd), "use map", name)
            check(self._lib.bpf_object__load(self._object), "load BPF object", self.name)
        except KernelRefusedError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of programs and maps."""
        if self._object:
            self._lib.bpf_object__close(self._object)
            self._object = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def program(self, name: str) -> Program:
        """Return a descriptor of its own for a program. Raises LookupError."""
        found = self._lib.bpf_object__find_program_by_name(self._object, name.encode())
        if not found:
            raise LookupError(f"{self.name}: has no program {name}")
        return Program(os.dup(self._lib.bpf_program__fd(found)), name)

    def _map(self, name: str) -> int:
        found = self._lib.bpf_object__find_map_by_name(self._object, name.encode())
        if not found:
            raise LookupError(f"{self.name}: has no map {name}")
        return int(found)

    def map(self, name: str) -> Map:
        """Return a descriptor of its own for a map. Raises LookupError."""
        found = self._lib.bpf_object__find_map_fd_by_name(self._object, name.encode())
        if found < 0:
            raise LookupError(f"{self.name}: has no map {name}")
        return Map(os.dup(found), name)


def program_by_number(number: int) -> Program | None:
    """Return a descriptor of a loaded program; None if there is none of that number. Raises KernelRefusedError."""
    fd = _by_number(library().bpf_prog_get_fd_by_id, number)
    if fd is None:
        return None
    program = Program(fd, f"program {number}")
    program.name = _text(program.info(), _PROGRAM_NAME_AT)
    return program


def _by_number(get: Any, number: int) -> int | None:
    done = int(get(number))
    if done == -errno.ENOENT:
        return None
    check(min(done, 0), "open", f"number {number}")
    return done


def _text(info: bytes, at: int) -> str:
    return info[at : at + NAME].split(b"\0")[0].decode()


def check(result: int, operation: str, what: str) -> None:
    """Raise KernelRefusedError for a negative result, which is libbpf's way to return an error."""
    if result < 0:
        raise KernelRefusedError(operation, what, os.strerror(-result))


@functools.cache
def library() -> Any:
    """Return the library, told to stay silent: what it would print is in the errors raised here. Raises MissingFeatureError."""
    try:
        lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise MissingFeatureError("libbpf.so.1", "the library is not installed") from error
    for name in ("bpf_object__open_file", "bpf_object__find_program_by_name", "bpf_object__find_map_by_name"):
        getattr(lib, name).restype = ctypes.c_void_p
    lib.bpf_object__find_map_by_name.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    lib.bpf_map__set_max_entries.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    lib.bpf_map__reuse_fd.argtypes = (ctypes.c_void_p, ctypes.c_int)
    lib.bpf_object__open_file.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    lib.bpf_object__find_program_by_name.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    lib.bpf_object__find_map_fd_by_name.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    for name in ("bpf_object__load", "bpf_object__close", "bpf_program__fd"):
        getattr(lib, name).argtypes = (ctypes.c_void_p,)
    lib.bpf_object__close.restype = None
    lib.libbpf_set_print.argtypes = (ctypes.c_void_p,)
    lib.libbpf_set_print.restype = ctypes.c_void_p
    lib.libbpf_set_print(None)
    return lib
