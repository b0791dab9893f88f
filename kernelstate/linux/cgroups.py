"""Cgroups of version 2, and programs at their hooks: where they are, who is there, exchanging one for another.

    /sys/fs/cgroup/unified        every process of the machine below it    programs at a cgroup see the sockets of its processes,
      '-- kubepods/...            those of some                            and of all cgroups below

A program stays at its cgroup, and keeps its maps, whatever becomes of us, until it is taken off or the cgroup is removed. Ours are
known by their names; those of others at the same cgroup are left alone. Source: cgroups(7), kernel/bpf/cgroup.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from kernelstate.errors import KernelRefusedError
from kernelstate.linux.bpf_attach import AttachOptions
from kernelstate.linux.libbpf import Program, check, library, program_by_number

BPF_F_ALLOW_MULTI, BPF_F_REPLACE = 1 << 1, 1 << 2
MOST_PROGRAMS = 64
"""As many the kernel lets be at one hook (BPF_CGROUP_MAX_PROGS)."""
MOUNTS = Path("/proc/thread-self/mountinfo")
_MOST_CGROUPS = 100_000


class Cgroup:
    """One cgroup by a descriptor; ``with`` closes it. Raises KernelRefusedError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelRefusedError("open cgroup", str(path), os.strerror(error.errno or 0)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def find(self, kind: int, name: str) -> Program | None:
        """Return the program of that name at a hook (``enum bpf_attach_type``); the caller closes it."""
        for number in self._numbers(kind):
            program = program_by_number(number)
            if program is not None:
                if program.name == name:
                    return program
                program.close()
        return None

    def attach(self, kind: int, program: Program) -> None:
        """Put a program at a hook, in one step instead of one of the same name."""
        options = AttachOptions(flags=BPF_F_ALLOW_MULTI)
        earlier = self.find(kind, program.name)
        if earlier is not None:
            if earlier.number == program.number:
                return earlier.close()
            options.flags, options.replace_prog_fd = BPF_F_ALLOW_MULTI | BPF_F_REPLACE, earlier.fd
        done = library().bpf_prog_attach_opts(program.fd, self._fd, kind, ctypes.byref(options))
        if earlier is not None:
            earlier.close()
        return check(done, f"attach {program.name} to", str(self.path))

    def detach(self, kind: int, program: Program) -> None:
        """Take a program off."""
        done = library().bpf_prog_detach2(program.fd, self._fd, kind)
        if done != -errno.ENOENT:
            check(done, f"detach {program.name} from", str(self.path))

    def _numbers(self, kind: int) -> tuple[int, ...]:
        numbers, count = (ctypes.c_uint32 * MOST_PROGRAMS)(), ctypes.c_uint32(MOST_PROGRAMS)
        done = library().bpf_prog_query(self._fd, kind, 0, None, numbers, ctypes.byref(count))
        if done in {-errno.EINVAL, -errno.EPERM}:
            return ()  # a file system of another kind, or a kernel without such hooks
        check(done, "ask for the programs of", str(self.path))
        return tuple(numbers[: count.value])


def mounted() -> tuple[Path, ...]:
    """Return where cgroups of version 2 are mounted, as far as this mount namespace can reach them; the widest view first."""
    found: list[Path] = []
    for line in MOUNTS.read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        path = Path(fields.split()[4].encode().decode("unicode_escape"))
        if kind.startswith("cgroup2 ") and (path / "cgroup.procs").exists():
            found.append(path)
    return tuple(sorted(dict.fromkeys(found), key=lambda p: len(p.parts)))


def is_cgroup(path: Path) -> bool:
    """Whether a path is a cgroup of version 2."""
    return (path / "cgroup.controllers").exists()


def every() -> Iterator[Path]:
    """Yield every cgroup that can be reached."""
    left = _MOST_CGROUPS
    for root in mounted():
        for folder, _, _ in os.walk(root, onerror=None):
            yield Path(folder)
            left -= 1
            if not left:
                return


def is_whole_machine() -> bool:
    """Whether the calling thread is in the network namespace of the machine itself, so that the root cgroup is its node's."""
    with contextlib.suppress(OSError):
        return Path("/proc/1/ns/net").stat().st_ino == Path("/proc/thread-self/ns/net").stat().st_ino
    return False
