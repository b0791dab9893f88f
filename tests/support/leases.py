"""Agents' keepers of leases in tests: made for a real etcd, asked what they know, ended afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path

import msgspec
from etcd_server import EtcdServer, wait_for

from kernelstate.linux import netns
from nodeplane.config_overlay import OverlayOptions
from nodeplane.lease_keeper import LeaseKeeper, LeaseState
from overlay.netconf import NetConf

CONF = NetConf(ip_network("10.5.0.0/16"))
MAC = "c6:d2:32:6f:8f:44"


def flannel_value(ip: str, mac: str = MAC, vni: int = 1) -> str:
    """Return what flanneld writes with the backend vxlan, byte for byte."""
    return f'{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":{vni},"VtepMAC":"{mac}"}}}}'


class Keepers:
    """Makes keepers whose files are in a directory of the test; a name may be used again, as a node that starts again."""

    def __init__(self, server: EtcdServer, directory: Path) -> None:
        self.server, self.directory = server, directory
        self.running: list[LeaseKeeper] = []

    def options(self, name: str, conf: NetConf = CONF, **changes: object) -> OverlayOptions:
        """Return a node's options."""
        found = OverlayOptions(conf, subnet_file=str(self.directory / f"{name}.env"), etcd=self.server.options)
        return msgspec.structs.replace(found, **changes)

    def make(self, name: str, *ips: str, conf: NetConf = CONF, **changes: object) -> LeaseKeeper:
        """Make one, told the node's addresses; it does nothing yet."""
        keeper = LeaseKeeper(self.options(name, conf, **changes), name, path=self.directory / f"{name}.json")
        keeper.tell({ip_address(ip).version: ip_address(ip) for ip in ips})
        return keeper

    def start(self, name: str, *ips: str, conf: NetConf = CONF, **changes: object) -> LeaseKeeper:
        """Make and start one."""
        keeper = self.make(name, *ips, conf=conf, **changes)
        with netns.inside(self.server.space):
            keeper.start()
        self.running.append(keeper)
        return keeper

    def end(self, *keepers: LeaseKeeper) -> None:
        """End some of them, or all."""
        for keeper in keepers or tuple(self.running):
            keeper.stop(10)
            self.running.remove(keeper)


@contextmanager
def lease_keepers(server: EtcdServer, directory: Path) -> Iterator[Keepers]:
    """Give out keepers; at the end none is left."""
    keepers = Keepers(server, directory)
    try:
        yield keepers
    finally:
        keepers.end()


def held(keeper: LeaseKeeper, seconds: float = 15.0) -> str:
    """Wait until a node has a lease and etcd answers, and return the subnet."""
    return wait_for(lambda: _subnet(keeper.state), "a lease", seconds)


def _subnet(state: LeaseState) -> str:
    return " ".join(state.lease.subnets) if state.members is not None and not state.lease.lost_since else ""


def peers(keeper: LeaseKeeper) -> Mapping[str, tuple[str, ...]]:
    """Return the other nodes that a keeper knows, and their subnets."""
    members = keeper.state.members or ()
    return {m.node: tuple(str(r.pod_cidr) for r in m.registrations) for m in members[1:] if m.registrations}
