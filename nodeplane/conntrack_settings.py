"""The kernel's connection tracking as configured: how many flows it holds, and for how long it remembers idle ones.

    conntrack.maxPerCore, .min        nf_conntrack_max, and the hash table's size where it is smaller than a quarter of it
    conntrack.tcpEstablishedTimeout   nf_conntrack_tcp_timeout_established        and so on
    conntrack.tcpBeLiberal            nf_conntrack_tcp_be_liberal

What is not stated has kube-proxy's default, but is then only ever raised, and nobody is told where that cannot be: the maximum is the
whole machine's, and read-only in any network namespace but its first. What is stated and cannot be set is a problem that people see;
kube-proxy would end. Written after the first sync, for only rules make the kernel load its connection tracking.
Source: kube-proxy cmd/kube-proxy/app/conntrack.go.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kernelstate.errors import KernelStateError
from kernelstate.linux import sysctl
from nodeplane.attendant import Attendant, Round
from nodeplane.config_node import ConntrackOptions

PER_CORE, LEAST, MOST = 32768, 131072, 1 << 20
TCP_ESTABLISHED, TCP_CLOSE_WAIT = 86400, 3600
HASH_SIZE = Path("/sys/module/nf_conntrack/parameters/hashsize")
_P = "net/netfilter/nf_conntrack_"


def flows_at_most(options: ConntrackOptions, cores: int) -> int | None:
    """Return what ``nf_conntrack_max`` should be; None: as it is."""
    per_core = PER_CORE if options.max_per_core is None else options.max_per_core
    if not per_core:
        return None
    return max(min(per_core * cores, MOST), LEAST if options.least is None else options.least)


class ConntrackSettings(Attendant):
    """Sets them once rules are in place, and again when they are to be others."""

    def __init__(self, options: ConntrackOptions) -> None:
        self._options = options
        self._is_set = False
        self._problems: tuple[str, ...] = ()

    def use(self, options: ConntrackOptions) -> None:
        """Set these from now on."""
        if options != self._options:
            self._options, self._is_set = options, False

    def synced(self, made: Round) -> None:
        """Set what is not set yet."""
        if not self._is_set:
            self._is_set = True
            self._problems = tuple(self._write())

    def problems(self) -> Sequence[str]:
        """Return what is stated and cannot be."""
        return self._problems

    def _write(self) -> list[str]:
        found = []
        o = self._options
        most = flows_at_most(o, os.cpu_count() or 1)
        if most is not None:
            stated = o.max_per_core is not None or o.least is not None
            found += _set("max", most, "maxPerCore", stated=stated) or _set_hash_size(most, stated=stated)
        found += _set("tcp_timeout_established", o.tcp_established, "tcpEstablishedTimeout", default=TCP_ESTABLISHED)
        found += _set("tcp_timeout_close_wait", o.tcp_close_wait, "tcpCloseWaitTimeout", default=TCP_CLOSE_WAIT)
        found += _set("udp_timeout", o.udp, "udpTimeout")
        found += _set("udp_timeout_stream", o.udp_stream, "udpStreamTimeout")
        found += _set("tcp_be_liberal", 1 if o.tcp_be_liberal else None, "tcpBeLiberal")
        return found


def _set(name: str, value: float | None, field: str, *, default: int = 0, stated: bool | None = None) -> list[str]:
    """Set one parameter; ``value`` None or 0 is its default, which 0 leaves alone. Return what cannot be, if it is stated."""
    is_stated = bool(value) if stated is None else stated
    wanted = int(value or default)
    if not wanted:
        return []
    try:
        if is_stated or int(sysctl.read(_P + name)) < wanted:
            sysctl.write(_P + name, wanted)
    except (KernelStateError, ValueError) as error:
        return [f"conntrack.{field}: {error}"] if is_stated else []
    return []


def _set_hash_size(most: int, *, stated: bool) -> list[str]:
    """Let the hash table grow with what it has to hold; a larger one stays."""
    try:
        if int(HASH_SIZE.read_text()) < most // 4:
            HASH_SIZE.write_text(str(most // 4))
    except (OSError, ValueError) as error:
        return [f"conntrack.maxPerCore: write {HASH_SIZE}: {error}"] if stated else []
    return []
