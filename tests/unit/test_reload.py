"""A changed configuration file: what is noticed, and what an agent that runs can take up."""

from __future__ import annotations

import pytest
from patience import eventually

from nodeplane.config import NodeConfig, parse_config
from nodeplane.reload import LIVE_FIELDS, LIVE_SERVICES, ConfigWatch, differing, is_live, with_live
from proxy.settings import ProxySettings

NODE = {"apiVersion": "nodeplane.dev/v1alpha1", "kind": "NodeConfiguration", "nodeName": "n1"}


def config(**fields):
    return parse_config(NODE | fields)


@pytest.mark.parametrize(
    ("fields", "names", "live"),
    [
        ({}, [], True),
        ({"services": {"iptables": {"masqueradeAll": True}}}, ["services.masquerade_all"], True),
        (
            {"services": {"nodePortAddresses": ["primary"], "clusterCIDR": "10.0.0.0/8"}},
            ["services.cluster_cidrs", "services.node_port_addresses"],
            True,
        ),
        ({"services": {"iptables": {"syncPeriod": "1m", "minSyncPeriod": "1s"}}}, ["min_sync_period", "sync_period"], True),
        ({"services": {"logging": {"verbosity": 5}}}, ["logs"], True),
        ({"services": {"conntrack": {"udpTimeout": "5s"}}}, ["conntrack"], True),
        ({"services": {"featureGates": {"x": True}}}, ["notes"], True),
        ({"services": {"metricsBindAddress": "0.0.0.0"}}, ["servers"], False),
        ({"services": {"ipvs": {"scheduler": "mh"}}}, ["services.scheduler"], False),
        ({"services": False}, ["services"], False),
        ({"serviceOptions": {"flowsToRemovedEndpoints": "reset"}}, ["services.flows_to_removed"], False),
        ({"policy": {"enabled": True}}, ["policy"], False),
        ({"overlay": {"Network": "10.244.0.0/16"}}, ["overlay"], False),
        ({"nodeName": "n2"}, ["node_name"], False),
    ],
)
def test_what_differs(fields, names, live):
    """Each change is named by its field; settings of rules and periods are live, what parts are made for is not."""
    found = differing(config(), config(**fields))
    assert found == names
    assert all(is_live(name) for name in found) == live


def test_live_fields_exist():
    """Every field said to be live is one."""
    assert set(NodeConfig.__struct_fields__) >= LIVE_FIELDS
    assert set(ProxySettings.__struct_fields__) >= LIVE_SERVICES


def test_what_runs_keeps_what_is_not_live():
    """What runs takes the live fields alone, and keeps what etcd said of its network."""
    running = config(overlay={"Network": "10.244.0.0/16"})
    wanted = config(services={"clusterCIDR": "10.0.0.0/8", "iptables": {"syncPeriod": "1m"}})
    assert with_live(running, wanted) == config(
        overlay={"Network": "10.244.0.0/16"}, services={"clusterCIDR": "10.0.0.0/8", "iptables": {"syncPeriod": "1m"}}
    )


@pytest.fixture
def watched(tmp_path):
    """Yield a file's path and its watch."""
    path = tmp_path / "config.yaml"
    path.write_text("a")
    watch = ConfigWatch(path)
    yield path, watch
    watch.close()


def is_noticed(watch):
    watch.turn()
    return watch.is_due


def replace(path):
    fresh = path.with_name("fresh")
    fresh.write_text("b")
    fresh.replace(path)


@pytest.mark.parametrize(
    "change", [lambda p: p.write_text("b"), replace, lambda p: p.unlink()], ids=["in place", "renamed", "gone"]
)
def test_noticed(watched, change):
    """A file that is written, replaced or gone is noticed, once."""
    path, watch = watched
    assert not is_noticed(watch)
    change(path)
    eventually(lambda: is_noticed(watch), 5)
    watch.seen()
    assert not is_noticed(watch)


def test_same_content_is_no_change(watched):
    """A file that is written with what it held, and files beside it, are passed over."""
    path, watch = watched
    path.write_text("a")
    path.with_name("other").write_text("b")
    assert not is_noticed(watch)


def test_a_config_map(tmp_path):
    """The swap of links by which a kubelet changes a ConfigMap is noticed."""
    for version, text in (("1", "a"), ("2", "b")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "config.yaml").write_text(text)
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "config.yaml").symlink_to("..data/config.yaml")
    watch = ConfigWatch(tmp_path / "config.yaml")
    (tmp_path / "..tmp").symlink_to("2")
    (tmp_path / "..tmp").replace(tmp_path / "..data")
    assert is_noticed(watch)
    watch.close()
