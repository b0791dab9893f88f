"""BPF programs for measuring: built by clang, loaded by the system's libbpf through ctypes, run by BPF_PROG_TEST_RUN.

    flows.bpf.c --clang--> object file --libbpf--> programs and maps --+-- attach_ingress: a link's tc hook
                                                                       +-- inject: live frames on a link

Links are those of the calling thread's network namespace. Nothing is pinned: closing the object ends its programs, except on
links, which end with their namespace. Source: libbpf 1.1 bpf.h and libbpf.h, kernel Documentation/bpf/bpf_prog_run.rst.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kernelstate.errors import KernelRefusedError, MissingFeatureError

BPF_F_TEST_XDP_LIVE_FRAMES = 1 << 1
BPF_TC_INGRESS = 1
BATCH = 64
"""Frames that the kernel hands to the stack at once: a NAPI poll's usual weight."""
_XDP_MD = struct.Struct("=6I")  # data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex


class _TestRun(ctypes.Structure):
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


class _TcHook(ctypes.Structure):
    """libbpf's ``struct bpf_tc_hook``."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("ifindex", ctypes.c_int),
        ("attach_point", ctypes.c_int),
        ("parent", ctypes.c_uint32),
    )


class _TcOpts(ctypes.Structure):
    """libbpf's ``struct bpf_tc_opts``."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("prog_fd", ctypes.c_int),
        ("flags", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("handle", ctypes.c_uint32),
        ("priority", ctypes.c_uint32),
    )


def build(source: Path, directory: Path) -> Path:
    """Compile a BPF program into ``directory`` and return the object's path. Raises MissingFeatureError, RuntimeError."""
    target = directory / f"{source.stem}.o"
    # Debian keeps <asm/types.h> in a folder that clang knows for the host's target only.
    include = Path(f"/usr/include/{os.uname().machine}-linux-gnu")
    command = ["clang", "-O2", "-g", "-target", "bpf", "-mcpu=v3", f"-I{include}", "-c", str(source), "-o", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError as error:
        raise MissingFeatureError("clang", "the program is not installed") from error
    if done.returncode != 0:
        raise RuntimeError(f"{source}: {done.stderr.strip()}")
    return target


class BpfObject:
    """A loaded object file; ``with`` unloads it. Raises MissingFeatureError without libbpf, KernelRefusedError when refused."""

    def __init__(self, path: Path) -> None:
        self._lib = _libbpf()
        self._name = path.name
        self._object = self._lib.bpf_object__open_file(os.fsencode(path), None)
        if not self._object:
            self._refused("open", "the file", -ctypes.get_errno())
        try:
            self._check(self._lib.bpf_object__load(self._object), "load", "its programs")
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

    def write(self, name: str, value: bytes) -> None:
        """Set the only element of an array map; ``value`` has the length of its C struct."""
        done = self._lib.bpf_map_update_elem(self._map(name), ctypes.byref(ctypes.c_uint32(0)), value, ctypes.c_uint64(0))
        self._check(done, "write map", name)

    def read(self, name: str, size: int) -> bytes:
        """Return the only element of an array map whose C struct has ``size`` bytes."""
        value = ctypes.create_string_buffer(size)
        self._check(self._lib.bpf_map_lookup_elem(self._map(name), ctypes.byref(ctypes.c_uint32(0)), value), "read map", name)
        return value.raw

    def attach_ingress(self, program: str, link: str) -> None:
        """Let a program see everything that comes in through a link."""
        hook = _TcHook(ctypes.sizeof(_TcHook), socket.if_nametoindex(link), BPF_TC_INGRESS, 0)
        self._check(self._lib.bpf_tc_hook_create(ctypes.byref(hook)), "make tc hook", link)
        options = _TcOpts(ctypes.sizeof(_TcOpts), self._program(program), 0, 0, 0, 0)
        self._check(self._lib.bpf_tc_attach(ctypes.byref(hook), ctypes.byref(options)), "attach to", link)

    def inject(self, program: str, link: str, size: int, count: int) -> int:
        """Let an XDP program make ``count`` frames of ``size`` bytes that come in through ``link``; return nanoseconds of CPU.

        The CPU time is this thread's in the system call: the frames run through the stack inside it, as far as the stack does
        not put them off to another CPU or to ksoftirqd.
        """
        context = _XDP_MD.pack(0, size, 0, socket.if_nametoindex(link), 0, 0)
        run = _TestRun(ctypes.sizeof(_TestRun))
        run.data_in, run.data_size_in = bytes(size), size
        run.ctx_in, run.ctx_size_in = context, len(context)
        run.repeat, run.flags, run.batch_size = count, BPF_F_TEST_XDP_LIVE_FRAMES, BATCH
        descriptor, reference = self._program(program), ctypes.byref(run)
        started = time.thread_time_ns()
        done = self._lib.bpf_prog_test_run_opts(descriptor, reference)
        spent = time.thread_time_ns() - started
        self._check(done, "inject frames by", program)
        return spent

    def _program(self, name: str) -> int:
        found = self._lib.bpf_object__find_program_by_name(self._object, name.encode())
        if not found:
            raise LookupError(f"{self._name}: has no program {name}")
        return int(self._lib.bpf_program__fd(found))

    def _map(self, name: str) -> int:
        found = self._lib.bpf_object__find_map_fd_by_name(self._object, name.encode())
        if found < 0:
            raise LookupError(f"{self._name}: has no map {name}")
        return int(found)

    def _check(self, result: int, operation: str, what: str) -> None:
        if result != 0:
            self._refused(operation, what, result)

    def _refused(self, operation: str, what: str, code: int) -> None:
        raise KernelRefusedError(f"{self._name}: {operation}", what, os.strerror(-code))


def _libbpf() -> Any:
    """Load the library and tell it to stay silent: what it would print is in the errors raised here."""
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise MissingFeatureError("libbpf.so.1", "the library is not installed") from error
    for name in ("bpf_object__open_file", "bpf_object__find_program_by_name"):
        getattr(library, name).restype = ctypes.c_void_p
    library.bpf_object__open_file.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    library.bpf_object__find_program_by_name.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    library.bpf_object__find_map_fd_by_name.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    for name in ("bpf_object__load", "bpf_object__close", "bpf_program__fd"):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    library.bpf_object__close.restype = None
    library.libbpf_set_print.argtypes = (ctypes.c_void_p,)
    library.libbpf_set_print.restype = ctypes.c_void_p
    library.libbpf_set_print(None)
    return library
