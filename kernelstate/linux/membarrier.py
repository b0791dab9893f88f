"""Waiting until every packet that was under way in this kernel is through: a grace period of RCU, which holds packets while they are judged.

membarrier(2) with MEMBARRIER_CMD_GLOBAL is just that (kernel/sched/membarrier.c: synchronize_rcu), in all kernels that have
nftables, but for those that run without a tick (nohz_full). There nothing is waited for but ``LONG``.
"""

from __future__ import annotations

import ctypes
import platform
import time

SYSCALL = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "armv7l": 389, "ppc64le": 365, "s390x": 356}
"""Its number by machine. Source: arch/*/entry/syscalls/*.tbl, include/uapi/asm-generic/unistd.h."""
GLOBAL = 1
LONG = 0.02
"""Seconds: a packet takes microseconds, unless it is held up."""


def wait_for_packets() -> None:
    """Return once every packet is through that was under way: 5 to 20 ms."""
    number = SYSCALL.get(platform.machine())
    if number is None or ctypes.CDLL(None).syscall(number, GLOBAL, 0, 0) != 0:
        time.sleep(LONG)
