"""NodePort addresses and pod detection: each setting, each family."""

from ipaddress import ip_address

import msgspec
import pytest
from entries import entry_of

from kernelstate.objects.address import Prefix
from kernelstate.objects.netfilter import ChainKey, Comment
from proxy.render.iptables_program import render_iptables
from proxy.settings import LocalDetector, NodeFacts, NodePortScope, ProxySettings, local_detector, node_port_scope
from proxy.table import ServiceTable

NODE = NodeFacts(
    "n1",
    addresses=(ip_address("192.168.1.1"),),
    pod_cidrs=(Prefix.parse("10.244.1.0/24"),),
    local_addresses=(Prefix.parse("10.9.0.1/32"), Prefix.parse("192.168.1.1/32"), Prefix.parse("fd00::1/128")),
)


@pytest.mark.parametrize(
    ("wanted", "family", "scope"),
    [
        ((), 4, NodePortScope(everywhere=True)),
        ((Prefix.parse("0.0.0.0/0"),), 4, NodePortScope(everywhere=True)),
        ((Prefix.parse("192.168.0.0/16"),), 4, NodePortScope(addresses=(Prefix.parse("192.168.1.1/32"),))),
        ((Prefix.parse("192.168.0.0/16"),), 6, NodePortScope(everywhere=True)),
        ((Prefix.parse("172.16.0.0/12"),), 4, NodePortScope()),
        ((Prefix.parse("127.0.0.0/8"),), 4, NodePortScope(addresses=(Prefix.parse("127.0.0.1/32"),))),
        ("primary", 4, NodePortScope(addresses=(Prefix.parse("192.168.1.1/32"),))),
        (
            "primary",
            6,
            NodePortScope(problem="nodePortAddresses is [primary], and Node n1 has no address for IPv6: NodePorts closed"),
        ),
    ],
)
def test_node_port_scope(wanted, family, scope):
    """nodePortAddresses: everywhere, by CIDR, primary; an unknown primary address closes NodePorts."""
    assert node_port_scope(ProxySettings(node_port_addresses=wanted), NODE, family) == scope


@pytest.mark.parametrize(
    ("fields", "detector"),
    [
        ({}, None),
        ({"cluster_cidrs": (Prefix.parse("10.244.0.0/16"),)}, LocalDetector(prefix=Prefix.parse("10.244.0.0/16"))),
        ({"cluster_cidrs": (Prefix.parse("fd00::/48"),)}, None),
        ({"detect_local_mode": "NodeCIDR"}, LocalDetector(prefix=Prefix.parse("10.244.1.0/24"))),
        ({"detect_local_mode": "BridgeInterface", "bridge_interface": "cni0"}, LocalDetector(interface="cni0")),
        ({"detect_local_mode": "InterfaceNamePrefix", "interface_name_prefix": "veth"}, LocalDetector(interface="veth+")),
    ],
)
def test_local_detector(fields, detector):
    """Each detectLocalMode, and none where it gives nothing for the family."""
    assert local_detector(ProxySettings(**fields), NODE, 4) == detector


def test_closed_node_ports_have_no_rule():
    """With an unknown primary address no NodePort rule exists at all, and the tail of KUBE-SERVICES leads nowhere."""
    table = ServiceTable({("default", "web"): (entry_of("web", node_port=30080),)})
    node = msgspec.structs.replace(NODE, addresses=())
    ruleset = render_iptables(table, ProxySettings(node_port_addresses="primary"), node, (4,))
    assert ruleset.chains[ChainKey(4, "nat", "KUBE-NODEPORTS")] == ()
    assert [r.comment for r in ruleset.chains[ChainKey(4, "nat", "KUBE-SERVICES")]] == ["default/web:http cluster IP"]


@pytest.mark.parametrize(("endpoints", "commented"), [(1000, True), (1001, False)])
def test_large_cluster(endpoints, commented):
    """Above 1,000 endpoints rules of pools and endpoints carry no comment; those of addresses still do."""
    table = ServiceTable({("default", "web"): (entry_of("web", endpoints=endpoints),)})
    chains = render_iptables(table, ProxySettings(), NODE, (4,)).chains
    for key, rules in chains.items():
        if key.name.startswith(("KUBE-SVC-", "KUBE-SEP-")):
            assert all(any(isinstance(m, Comment) for m in rule.matches) is commented for rule in rules)
    assert all(rule.comment for rule in chains[ChainKey(4, "nat", "KUBE-SERVICES")])


def test_health_check_port_stays_open_without_frontends():
    """A Service that lost every address to another keeps its health check port, and has no chain that nothing leads to."""
    entry = msgspec.structs.replace(entry_of("web"), frontends=(), health_check_node_port=32000)
    chains = render_iptables(ServiceTable({("default", "web"): (entry,)}), ProxySettings(), NODE, (4,)).chains
    assert [r.comment for r in chains[ChainKey(4, "filter", "KUBE-NODEPORTS")]] == ["default/web:http health check node port"]
    assert not any(key.name.startswith(("KUBE-SVC-", "KUBE-SEP-")) for key in chains)
