"""What a node with leases in etcd is told by its configuration, keeps in its state file, and says in its status."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import msgspec
import pytest

from nodeplane.config_fields import ConfigError
from nodeplane.config_overlay import EtcdOptions, read_overlay
from nodeplane.lease_keeper import LeaseKeeper
from nodeplane.lease_store import Saved, SavedEntry, load, save
from nodeplane.status import LeaseStatus, Status, status_lines
from overlay.netconf import NetConf, VxlanBackend

ETCD = {"registry": {"type": "etcd"}}
NETWORK = {"Network": "10.5.0.0/16"}
VALUE = (
    '{"PublicIP":"192.168.1.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}}'
)
SAVED = Saved("/coreos.com/network", '{"Network":"10.5.0.0/16"}', "10.5.7.0-24", 1e9, {"10.5.7.0-24": SavedEntry(VALUE, 5, 9)})


def test_network_may_be_in_etcd() -> None:
    """With leases in etcd the file may leave out all of net-conf, and what it states counts."""
    options = read_overlay({**ETCD, "iface": "eth0"})
    assert (options.network_in_etcd, options.net_conf.families) == (True, ())
    options = read_overlay({**ETCD, **NETWORK})
    assert (options.network_in_etcd, options.net_conf) == (False, NetConf(ip_network("10.5.0.0/16"), backend=VxlanBackend()))


@pytest.mark.parametrize(
    ("overlay", "words"),
    [
        (
            {**ETCD, "Backend": {"Type": "vxlan"}},
            r"overlay\.Network: must be given .*; or leave out all of net-conf, and etcd says",
        ),
        (
            {**ETCD, **NETWORK, "SubnetLen": 24, "SubnetMin": "10.5.0.1"},
            r"overlay\.SubnetMin: must be the first address of a /24",
        ),
        ({**ETCD, "Network": "10.5.0.0/30"}, r"overlay\.Network: must be /28 or larger"),
        (
            {**ETCD, "EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fc00::/48"},
            r"overlay\.EnableIPv4: must be true with leases in etcd: flannel's keys begin with an IPv4 subnet",
        ),
        ({"iface": "eth0"}, r"overlay\.Network: must be given unless EnableIPv4 is false$"),
    ],
)
def test_networks_that_cannot_be(overlay: dict[str, object], words: str) -> None:
    """What etcd's subnets cannot be made from, or is stated in part, is an error that names the field."""
    with pytest.raises(ConfigError, match=words):
        read_overlay(overlay)


def test_state_file(tmp_path: Path) -> None:
    """What was saved is loaded again; a file of another prefix, a broken one, or none is as good as nothing."""
    path = tmp_path / "lib" / "overlay.json"
    assert load("/coreos.com/network", path) == Saved("/coreos.com/network")
    save(SAVED, path)
    assert load("/coreos.com/network", path) == SAVED
    assert load("/other", path) == Saved("/other")
    path.write_bytes(path.read_bytes()[:-20])
    assert load("/coreos.com/network", path) == Saved("/coreos.com/network")
    assert [file.name for file in path.parent.iterdir()] == ["overlay.json"]


@pytest.mark.parametrize(
    ("conf", "known"),
    [
        (NetConf(ip_network("10.5.0.0/16")), True),
        (NetConf(ip_network("10.5.0.0/16"), ip_network("fc00::/48")), False),
        (NetConf(ip_network("10.6.0.0/16")), False),
        (NetConf(None), False),
    ],
)
def test_saved_lease_is_of_this_network(tmp_path: Path, conf: NetConf, known: bool) -> None:
    """A keeper begins with the lease that was saved, unless the network has become another."""
    save(SAVED, tmp_path / "overlay.json")
    options = read_overlay({**ETCD, **NETWORK, "subnetFile": str(tmp_path / "none")})
    keeper = LeaseKeeper(msgspec.structs.replace(options, net_conf=conf), "n1", path=tmp_path / "overlay.json")
    assert (keeper.state.members is not None) == known
    if known:
        (own,) = keeper.state.members or ()
        assert own.registrations[0].public_ip == ip_address("192.168.1.1")
        assert (keeper.state.lease.subnets, keeper.state.lease.until) == (("10.5.7.0/24",), 1e9)


@pytest.mark.parametrize(
    ("lease", "lines"),
    [
        (LeaseStatus(), ["lease     none yet", "etcd      answers at "]),
        (
            LeaseStatus(("10.5.7.0/24",), endpoint="http://e:1"),
            ["lease     10.5.7.0/24, reserved", "etcd      answers at http://e:1"],
        ),
        (
            LeaseStatus(("10.5.7.0/24", "fc00::/64"), 1e9, error="no answer", lost_since=1.0),
            ["lease     10.5.7.0/24, fc00::/64, until 2001-09-09 ", "etcd      LOST ", "          no answer"],
        ),
    ],
)
def test_status(lease: LeaseStatus, lines: list[str]) -> None:
    """The status says the subnet, until when, whether etcd answers, since when it does not, and why."""
    said = status_lines(Status(1, "n1", "iptables", overlay="vxlan", lease=lease), running=True)
    assert [line[: len(start)] for line, start in zip(said[-len(lines) :], lines, strict=True)] == lines


def test_default_endpoint() -> None:
    """Without endpoints etcd is asked for on this machine."""
    assert read_overlay({**ETCD, **NETWORK}).etcd == EtcdOptions()
