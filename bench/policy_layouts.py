"""The ways to write policies that are measured beside each other, each on a node of its own.

    none               no rule at all: what routing costs
    conntrack          one rule that looks at the connection's state: what tracking connections costs anybody
    nftables, iptables, iptables-nft
                       as the agent programs them; iptables means legacy with ipset, iptables-nft the same through nf_tables
    chain per policy   what many engines write, for comparison: a chain for each pod, which asks a chain for each of its policies

        FORWARD -> BENCH-NETPOL   -d POD -j KUBE-POD-FW-n     one jump for each pod of the node, in order
        KUBE-POD-FW-n             established: accept; then -j KUBE-NWPLCY-k for each policy that selects it; marked: return; reject
        KUBE-NWPLCY-k             --match-set KUBE-SRC-k src, --match-set KUBE-DST-k dst, tcp dport 8080: mark, return

The agent has ended before anything is measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import msgspec

from bench import cluster
from bench.policies import PORT, client_address, server_address
from bench.running import running_agent
from kernelstate.diff_sets import AddMembers, CreateSet, SetChange
from kernelstate.errors import KernelRefusedError
from kernelstate.linux import netns, nftables
from kernelstate.linux.ipset import LinuxIpset, has_ipset
from kernelstate.linux.iptables import IptablesPort, Variant, is_available
from kernelstate.objects.sets import SetSpec
from nodeplane.commands import Failed
from nodeplane.config import POLICY_MODES

_LONGEST = 300.0
"""Seconds until a first sync is given up."""
_ROOM = 1024
TRACKING = "*filter\n-A FORWARD -m conntrack --ctstate INVALID -j DROP\nCOMMIT\n"


class Layout(msgspec.Struct, frozen=True):
    """One way. ``mode`` is the agent's policy mode; none: the agent has nothing to do with it."""

    name: str
    mode: str = "none"
    variant: Variant = "legacy"


NONE, CONNTRACK, CHAINS = Layout("none"), Layout("conntrack"), Layout("chain per policy")
OURS = (Layout("nftables", "nftables"), Layout("iptables", "iptables"), Layout("iptables-nft", "iptables", "nft"))


def layouts_here(bench: str, modes: Sequence[str]) -> list[Layout]:
    """Return those of ours that were asked for and that this kernel has. Raises Failed when none is left."""
    wanted = [layout for layout in OURS if layout.mode in modes]
    found = [layout for layout in wanted if _is_here(layout)]
    if not wanted:
        raise Failed(f"{bench}: policy modes are {' and '.join(POLICY_MODES)}, not {' and '.join(modes)}")
    if not found:
        raise Failed(f"{bench}: this kernel has no {' and no '.join(layout.name for layout in wanted)}")
    return found


def _is_here(layout: Layout) -> bool:
    if layout.mode == "nftables":
        return nftables.is_available()
    return has_ipset() and is_available(layout.variant)


def configuration(layout: Layout) -> dict[str, Any]:
    """Return a NodeConfiguration that leaves Services to somebody else."""
    return {
        "apiVersion": "nodeplane.dev/v1alpha1",
        "kind": "NodeConfiguration",
        "nodeName": cluster.NODE,
        "iptablesVariant": layout.variant,
        "services": False,
        "policy": {"enabled": True, "mode": layout.mode},
    }


def program(namespace: str, layout: Layout, objects: Path) -> None:
    """Let the agent program a node from a directory of objects, and end it. Raises Failed."""
    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory:
        root = Path(directory)
        (root / "objects").symlink_to(objects)
        with running_agent(namespace, root, configuration(layout)) as agent:
            agent.wait(agent.is_synced, f"the first sync of policies in {layout.name}", _LONGEST)


def track(namespace: str) -> None:
    """Write the rule of *conntrack*."""
    with netns.inside(namespace):
        IptablesPort("legacy").apply(4, TRACKING)


def write_chains(namespace: str, pods: int, policies: int) -> None:
    """Write *chain per policy* for so many pods, with policies that all select the last of them. Raises KernelStateError."""
    with netns.inside(namespace):
        words = LinuxIpset().apply(list(_sets(pods, policies)))
        if words:
            raise KernelRefusedError("make", "ipsets", words)
        IptablesPort("legacy").apply(4, chains_text(pods, policies))


def _sets(pods: int, policies: int) -> Iterable[SetChange]:
    """Yield the sets: for each policy, whom it lets in and whom it selects."""
    for k in range(policies):
        for name, address in ((f"KUBE-SRC-{k:05d}", client_address(k)), (f"KUBE-DST-{k:05d}", server_address(pods - 1))):
            spec = SetSpec(name, "hash:ip", 4)
            yield CreateSet(spec, _ROOM)
            yield AddMembers(spec, [(address,)])


def chains_text(pods: int, policies: int) -> str:
    """Return the text for iptables-restore."""
    chains = [
        "BENCH-NETPOL",
        *(f"KUBE-POD-FW-{n:03d}" for n in range(pods)),
        *(f"KUBE-NWPLCY-{k:05d}" for k in range(policies)),
    ]
    rules = ["-A FORWARD -j BENCH-NETPOL"]
    for n in range(pods):
        chain, address = f"KUBE-POD-FW-{n:03d}", IPv4Address(server_address(n))
        rules += [f"-A BENCH-NETPOL -d {address}/32 -j {chain}", f"-A BENCH-NETPOL -s {address}/32 -j {chain}"]
        rules.append(f"-A {chain} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT")
        if n == pods - 1:
            rules += [f"-A {chain} -j KUBE-NWPLCY-{k:05d}" for k in range(policies)]
            rules.append(f"-A {chain} -m mark ! --mark 0x10000/0x10000 -j REJECT")
            rules.append(f"-A {chain} -j MARK --set-xmark 0x0/0x10000")
    for k in range(policies):
        chain = f"KUBE-NWPLCY-{k:05d}"
        match = f"-m set --match-set KUBE-SRC-{k:05d} src -m set --match-set KUBE-DST-{k:05d} dst -p tcp -m tcp --dport {PORT}"
        rules.append(f"-A {chain} {match} -j MARK --set-xmark 0x10000/0x10000")
        rules.append(f"-A {chain} -m mark --mark 0x10000/0x10000 -j RETURN")
    return "\n".join(["*filter", *(f":{chain} - [0:0]" for chain in chains), *rules, "COMMIT", ""])
