"""BPF programs for measuring: built by clang, loaded by the system's libbpf, run by BPF_PROG_TEST_RUN.

    flows.bpf.c --clang--> object file --libbpf--> programs and maps --+-- attach_ingress: a link's tc hook
                                                                       +-- inject: live frames on a link

Links are those of the calling thread's network namespace. Programs on links end with their namespace, the others with the object.
Source: kernel Documentation/bpf/bpf_prog_run.rst.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import time
from pathlib import Path

from kernelstate.errors import MissingFeatureError
from kernelstate.linux.bpf_attach import Clsact, Hook
from kernelstate.linux.libbpf import BpfObject, RunOptions, check, library

BPF_F_TEST_XDP_LIVE_FRAMES = 1 << 1
BATCH = 64
"""Frames that the kernel hands to the stack at once: a NAPI poll's usual weight."""
_XDP_MD = struct.Struct("=6I")  # data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
_ONLY = bytes(4)


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


class Generator(BpfObject):
    """A loaded object file that makes and counts packets; ``with`` unloads it. Raises as ``BpfObject`` does."""

    def write(self, name: str, value: bytes) -> None:
        """Set the only element of an array map; ``value`` has the length of its C struct."""
        with self.map(name) as table:
            table[_ONLY] = value

    def read(self, name: str) -> bytes:
        """Return the only element of an array map."""
        with self.map(name) as table:
            return table[_ONLY]

    def attach_ingress(self, program: str, link: str) -> None:
        """Let a program see everything that comes in through a link."""
        with self.program(program) as one:
            Clsact().attach(Hook(program, socket.if_nametoindex(link), "ingress"), one)

    def inject(self, program: str, link: str, size: int, count: int) -> int:
        """Let an XDP program make ``count`` frames of ``size`` bytes that come in through ``link``; return nanoseconds of CPU.

        The CPU time is this thread's in the system call: the frames run through the stack inside it, as far as the stack does
        not put them off to another CPU or to ksoftirqd.
        """
        context = _XDP_MD.pack(0, size, 0, socket.if_nametoindex(link), 0, 0)
        run = RunOptions(data_in=bytes(size), data_size_in=size, ctx_in=context, ctx_size_in=len(context))
        run.repeat, run.flags, run.batch_size = count, BPF_F_TEST_XDP_LIVE_FRAMES, BATCH
        with self.program(program) as one:
            reference = ctypes.byref(run)
            started = time.thread_time_ns()
            done = library().bpf_prog_test_run_opts(one.fd, reference)
            spent = time.thread_time_ns() - started
        check(done, "inject frames by", program)
        return spent
