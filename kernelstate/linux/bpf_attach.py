"""Lets programs see a link's traffic, in the network namespace of the calling thread, and finds them again later.

    tcx     programs in a row at the link itself                                            Linux 6.6
    clsact  a filter each on the link's clsact queue, known by its handle and priority      before

Neither needs anybody to hold it: programs, and with them their maps, stay until they are taken off or the link goes, whatever
becomes of us. A program is ours by its name. One is exchanged for another between two packets; those of others on the same link
are left alone. Source: include/uapi/linux/bpf.h, kernel/bpf/mprog.c, net/sched/cls_bpf.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from typing import Literal, Protocol

import msgspec

from kernelstate.errors import KernelRefusedError, MissingFeatureError
from kernelstate.linux import rtnetlink
from kernelstate.linux.libbpf import Options, Program, check, library, program_by_number

Direction = Literal["ingress", "egress"]
TCX: dict[Direction, int] = {"ingress": 46, "egress": 47}
MOST_PROGRAMS = 64
"""As many the kernel lets be at one hook (BPF_MPROG_MAX)."""
BPF_F_REPLACE = 1 << 2
TC_POINT: dict[Direction, int] = {"ingress": 1, "egress": 2}
BPF_TC_F_REPLACE = 1
PRIORITY = 0x4E50
"""Of our first filter; leaves room for others on both sides."""
RTM_DELQDISC, RTM_GETTFILTER = 37, 46
TC_H_CLSACT, TC_H_MIN_INGRESS, TC_H_MIN_EGRESS = 0xFFFFFFF1, 0xFFFFFFF2, 0xFFFFFFF3
LOOPBACK = 1
_TCMSG = struct.Struct("=BxxxiIII")  # family, interface, handle, parent, info
_NO_QUEUE = {-errno.ENOENT, -errno.EINVAL}
"""What is answered for a filter that is not there, and for a link without a clsact queue."""


class Hook(msgspec.Struct, frozen=True):
    """A place for one program of ours: its name, the link's index, the direction, and which of our programs there it is."""

    program: str
    interface: int
    direction: Direction
    order: int = 0

    def __str__(self) -> str:
        return f"{self.direction} of interface {self.interface}"


class Attacher(Protocol):
    """One of the two ways."""

    def find(self, hook: Hook) -> Program | None:
        """Return the program of ours at the hook; None if there is none, or no such link. Raises KernelRefusedError."""

    def attach(self, hook: Hook, program: Program) -> None:
        """Let it be at the hook, instead of an earlier one of ours. Raises KernelRefusedError."""

    def detach(self, hook: Hook) -> bool:
        """Take ours off; whether there was one. Raises KernelRefusedError."""


class AttachOptions(Options):
    """libbpf's ``struct bpf_prog_attach_opts``."""

    _fields_ = (("sz", ctypes.c_size_t), ("flags", ctypes.c_uint), ("replace_prog_fd", ctypes.c_int))


class _TcHook(Options):
    """libbpf's ``struct bpf_tc_hook``."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("ifindex", ctypes.c_int),
        ("attach_point", ctypes.c_int),
        ("parent", ctypes.c_uint32),
    )


class _TcOptions(Options):
    """libbpf's ``struct bpf_tc_opts``."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("prog_fd", ctypes.c_int),
        ("flags", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("handle", ctypes.c_uint32),
        ("priority", ctypes.c_uint32),
    )


def attacher() -> Attacher:
    """Return the better way that this kernel has. Raises MissingFeatureError where it has, or allows, no programs at all."""
    try:
        return Tcx() if _query(LOOPBACK, TCX["ingress"]) is not None else Clsact()
    except KernelRefusedError as error:
        raise MissingFeatureError("bpf", error.reason) from error


class Tcx:
    """Programs in a row at the link."""

    def find(self, hook: Hook) -> Program | None:
        """Look through the programs at the hook for one of that name."""
        for number in _query(hook.interface, TCX[hook.direction]) or ():
            program = program_by_number(number)
            if program is not None:
                if program.name == hook.program:
                    return program
                program.close()
        return None

    def attach(self, hook: Hook, program: Program) -> None:
        """Exchange or add it."""
        earlier = self.find(hook)
        options = AttachOptions()
        if earlier is not None:
            if earlier.number == program.number:
                return earlier.close()
            options.flags, options.replace_prog_fd = BPF_F_REPLACE, earlier.fd
        kind = TCX[hook.direction]
        done = library().bpf_prog_attach_opts(program.fd, hook.interface, kind, ctypes.byref(options))
        if earlier is not None:
            earlier.close()
        return check(done, f"attach {hook.program} to", str(hook))

    def detach(self, hook: Hook) -> bool:
        """Take it out of the row."""
        program = self.find(hook)
        if program is None:
            return False
        with program:
            done = library().bpf_prog_detach2(program.fd, hook.interface, TCX[hook.direction])
        check(done, f"detach {hook.program} from", str(hook))
        return True


def _query(interface: int, kind: int) -> tuple[int, ...] | None:
    """Return the numbers of the programs at a hook; none for a link that is gone, None if the kernel has no such hooks."""
    numbers, count = (ctypes.c_uint32 * MOST_PROGRAMS)(), ctypes.c_uint32(MOST_PROGRAMS)
    done = library().bpf_prog_query(interface, kind, 0, None, numbers, ctypes.byref(count))
    if done == -errno.EINVAL:
        return None
    if done in {-errno.ENODEV, -errno.ENOENT}:
        return ()
    check(done, "ask for the programs of", f"interface {interface}")
    return tuple(numbers[: count.value])


class Clsact:
    """Filters on the link's clsact queue, which is made where it is missing."""

    def find(self, hook: Hook) -> Program | None:
        """Ask for the filter with our handle and priority."""
        options = _filter(hook)
        done = library().bpf_tc_query(ctypes.byref(_point(hook)), ctypes.byref(options))
        if done in _NO_QUEUE or done == -errno.ENODEV:
            return None
        check(done, "look for filter at", str(hook))
        program = program_by_number(options.prog_id)
        if program is not None and program.name != hook.program:
            program.close()
            return None
        return program

    def attach(self, hook: Hook, program: Program) -> None:
        """Make or replace the filter."""
        both = _TcHook(ifindex=hook.interface, attach_point=TC_POINT["ingress"] | TC_POINT["egress"])
        done = library().bpf_tc_hook_create(ctypes.byref(both))
        if done != -errno.EEXIST:
            check(done, "make clsact queue for", str(hook))
        options = _filter(hook)
        options.prog_fd, options.flags = program.fd, BPF_TC_F_REPLACE
        done = library().bpf_tc_attach(ctypes.byref(_point(hook)), ctypes.byref(options))
        check(done, f"attach {hook.program} to", str(hook))

    def detach(self, hook: Hook) -> bool:
        """Remove the filter, and the queue if no other filter is left on it: an empty one does nothing."""
        program = self.find(hook)
        if program is None:
            return False
        program.close()
        done = library().bpf_tc_detach(ctypes.byref(_point(hook)), ctypes.byref(_filter(hook)))
        check(done, f"detach {hook.program} from", str(hook))
        with contextlib.closing(rtnetlink.RouteSocket()) as netlink:
            for parent in (TC_H_MIN_INGRESS, TC_H_MIN_EGRESS):
                if netlink.dump(RTM_GETTFILTER, _TCMSG.pack(0, hook.interface, 0, parent, 0), "filters"):
                    return True
            request = rtnetlink.Request(RTM_DELQDISC, 0, _TCMSG.pack(0, hook.interface, 0, TC_H_CLSACT, 0))
            answer = netlink.execute([request])[0]
        if answer.code not in {0, errno.ENOENT}:
            raise KernelRefusedError("remove clsact queue of", f"interface {hook.interface}", os.strerror(answer.code))
        return True


def _point(hook: Hook) -> _TcHook:
    return _TcHook(ifindex=hook.interface, attach_point=TC_POINT[hook.direction])


def _filter(hook: Hook) -> _TcOptions:
    return _TcOptions(handle=1, priority=PRIORITY + hook.order)
