"""The packet filter through the iptables tools: one variant, legacy or nft, in the calling thread's network namespace.

    apply        iptables-VARIANT-restore -w 5 --noflush --counters  < text      one process, one transaction per table
    observe      iptables-VARIANT-save                                           one listing, read as text
    generation   legacy: getsockopt IPT_SO_GET_INFO per table                    (rules, bytes, hook offsets)
                 nft:    NFT_MSG_GETGEN                                          a commit counter

Decides which of the two variants this host uses (``choose_variant``) and turns the tools' complaints into errors that name
the rule. Reading back through python-iptables, which shares nothing with the text above, is ``xt_readback.py``.

What is there belongs to the variant that wrote it: rules of the other variant work as well but are invisible to these tools.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from kernelstate.errors import KernelRefusedError, MissingFeatureError
from kernelstate.features import Feature
from kernelstate.linux.nfnetlink import NfNetlink, attributes
from kernelstate.objects.address import Family
from kernelstate.objects.netfilter import ChainKey, Rule, Ruleset
from kernelstate.text.iptables_parse import parse_save

Variant: TypeAlias = Literal["legacy", "nft"]

TIMEOUT = 600.0
"""Seconds until a restore or save is given up; iptables-nft does need minutes for tens of thousands of chains."""

NAMES_FILE = {4: "/proc/thread-self/net/ip_tables_names", 6: "/proc/thread-self/net/ip6_tables_names"}
_GET_INFO = {4: (socket.AF_INET, socket.IPPROTO_IP, 64), 6: (socket.AF_INET6, socket.IPPROTO_IPV6, 64)}
_INFO_SIZE = 84  # struct ipt_getinfo: name[32], valid_hooks, hook_entry[5], underflow[5], num_entries, size
_NFT_GETGEN, _NFTA_GEN_ID = 10 << 8 | 16, 1  # NFNL_SUBSYS_NFTABLES is 10

_libc = ctypes.CDLL(None, use_errno=True)


class IptablesPort:
    """Implements ``ports.NetfilterPort``."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self._others: dict[Family, int] = {4: 0, 6: 0}  # nft: commits made by us to the other family

    def observe(self, family: Family, known: Mapping[ChainKey, Sequence[Rule]] | None = None) -> Ruleset:
        """Return everything the variant holds for the family. Raises KernelRefusedError."""
        return parse_save(_run([tool(family, self.variant, "save")], ""), family, known)

    def apply(self, family: Family, restore_text: str) -> None:
        """Feed one restore text. Raises KernelRefusedError with the refused rule and its line."""
        before = self._commits()
        _run([tool(family, self.variant, "restore"), "-w", "5", "--noflush", "--counters"], restore_text)
        # nft counts commits of both families together. Ours to this family are no news to the other one, unless the count
        # does not add up: then somebody else committed in between, which may be anything.
        commits = restore_text.count("\nCOMMIT")
        if self._commits() - before == commits:
            self._others[6 if family == 4 else 4] += commits

    def generation(self, family: Family) -> object:
        """Return what changes when anybody changes this family's rules.

        Legacy does not see an edit that leaves the number and the sizes of all rules and chains as they were.
        """
        if self.variant == "nft":
            return self._commits() - self._others[family]
        return tuple(_table_info(family, table) for table in legacy_tables(family))

    def _commits(self) -> int:
        """Return nft's commit counter; 0 for legacy."""
        if self.variant == "legacy":
            return 0
        with NfNetlink() as netlink:
            data, start, end = netlink.get("read the nftables generation", _NFT_GETGEN, socket.AF_UNSPEC)
        first, last = attributes(data, start, end)[_NFTA_GEN_ID]
        return int.from_bytes(data[first:last], "big")


MANY_CHAINS = 5000
"""From here on iptables-nft, which reads every chain back at each change and loads them in more than linear time, is slow."""


def choose_variant(chains: int = 0) -> tuple[Variant, str]:
    """Return the variant this host uses and why, in words. Raises MissingFeatureError when it has neither.

    Kubelet leaves chains in mangle as a hint; else whoever holds more rules; on an empty host the variant behind its
    ``iptables`` command, so that people see our rules with the command they have. Only where about ``chains`` chains are going
    to be written and that is many, legacy: iptables-nft takes minutes where legacy takes seconds.
    """
    has_legacy, has_nft = is_available("legacy"), is_available("nft")
    if not (has_legacy and has_nft):
        if has_legacy:
            return "legacy", "iptables-nft is not available here"
        if has_nft:
            return "nft", "iptables-legacy is not available here"
        raise MissingFeatureError(Feature.IPTABLES_LEGACY, f"and neither is {Feature.IPTABLES_NFT}")
    texts: dict[Variant, str] = {"nft": _save_all("nft"), "legacy": _save_all("legacy")}
    for variant, text in texts.items():
        for hint in ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"):
            if f"\n:{hint} " in text:
                return variant, f"kubelet left its chain {hint} in iptables-{variant}"
    rules = {variant: text.count("\n-A ") for variant, text in texts.items()}
    if rules["legacy"] > rules["nft"]:
        return "legacy", f"iptables-legacy holds {rules['legacy']} rules, iptables-nft {rules['nft']}"
    if rules["nft"]:
        return "nft", f"iptables-nft holds {rules['nft']} rules, iptables-legacy {rules['legacy']}"
    if chains >= MANY_CHAINS:
        return "legacy", f"neither variant holds rules, and legacy is the faster one for {chains} chains"
    command = Path(shutil.which("iptables") or "").resolve().name
    return ("legacy" if "legacy" in command else "nft"), f"neither variant holds rules, and this host's iptables is {command}"


def families() -> tuple[Family, ...]:
    """Return the families whose packet filter can be used here: 6 is missing where IPv6 is off in the kernel."""
    return (4, 6) if Path("/proc/thread-self/net/if_inet6").exists() else (4,)


def tool(family: Family, variant: Variant, kind: Literal["save", "restore"]) -> str:
    """Return a tool's path. Raises MissingFeatureError."""
    name = f"{'iptables' if family == 4 else 'ip6tables'}-{variant}-{kind}"
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise MissingFeatureError(name, "the program is not installed")
    return path


def legacy_tables(family: Family) -> list[str]:
    """Return the legacy tables that exist in this namespace; asking for any other would make the kernel create it."""
    try:
        return sorted(Path(NAMES_FILE[family]).read_text(encoding="ascii").split())
    except FileNotFoundError:
        return []


def is_available(variant: Variant) -> bool:
    """Whether a variant can be used: its programs are installed and the kernel knows it."""
    try:
        program = tool(4, variant, "save")
        if variant == "legacy":
            # The file appears once ip_tables is in the kernel; iptables-legacy-save of a table would create that table.
            return Path(NAMES_FILE[4]).exists()
        return subprocess.run([program], capture_output=True, timeout=TIMEOUT, check=False).returncode == 0
    except MissingFeatureError:
        return False


def _save_all(variant: Variant) -> str:
    return "".join(_run([tool(family, variant, "save")], "") for family in families())


def _table_info(family: Family, table: str) -> bytes:
    """Return the kernel's summary of a legacy table: hooks, number of entries, size."""
    address_family, level, option = _GET_INFO[family]
    info = ctypes.create_string_buffer(table.encode(), _INFO_SIZE)
    size = ctypes.c_uint32(_INFO_SIZE)
    with socket.socket(address_family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as sock:
        if _libc.getsockopt(sock.fileno(), level, option, info, ctypes.byref(size)) != 0:
            raise KernelRefusedError("read the size of iptables table", table, os.strerror(ctypes.get_errno()))
    return info.raw


def entries(family: Family, table: str) -> int:
    """Return how many entries a legacy table holds: rules, plus two for each chain of one's own and one for others."""
    return int(struct.unpack_from("=I", _table_info(family, table), 76)[0])


def _run(command: list[str], text: str) -> str:
    """Run a tool to its end. Raises KernelRefusedError with its complaint."""
    name = Path(command[0]).name
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            input=text.encode(errors="surrogateescape"),
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelRefusedError("run", name, str(error)) from error
    if done.returncode != 0:
        raise refusal(name, text, done.stderr.decode(errors="replace"))
    return done.stdout.decode(errors="surrogateescape")


def refusal(name: str, text: str, complaint: str) -> KernelRefusedError:
    """Turn a restore tool's complaint into an error that names the refused line of ``text`` and the tool's words."""
    found = re.search(r"line:? (\d+)", complaint)
    line = int(found[1]) if found else 0
    lines = text.splitlines()
    words = re.sub(r"(?m)^(Error occurred at line.*|Try .*--help.*|[\w-]+: line \d+ failed)$", "", complaint)
    words = re.sub(r"ip6?tables[\w-]*( v[\d.]+ \(\w+\))?: *|line \d+: *", "", words)
    words = " ".join(words.split()) or "refused without a word"
    if not 0 < line <= len(lines) or lines[line - 1].startswith("*"):
        return KernelRefusedError("run", name, words)  # about the table or the tool, not about a rule
    refused = lines[line - 1]
    return KernelRefusedError(name, refused[:300], words, line)
