"""Configuration files: what they say is taken, what they get wrong is named by path and value."""

import pytest

from kernelstate.objects.address import Prefix
from nodeplane.config import load_config, parse_config
from nodeplane.config_fields import ConfigError
from nodeplane.config_node import Bind, ConntrackOptions, LogOptions, ServerOptions
from nodeplane.config_overlay import read_overlay

NODE = {"apiVersion": "nodeplane.dev/v1alpha1", "kind": "NodeConfiguration", "nodeName": "n1"}
KUBE_PROXY = {"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"}


def node(**fields):
    """Return a NodeConfiguration with these fields."""
    return NODE | fields


def test_plain_kube_proxy_configuration():
    """A KubeProxyConfiguration as kube-proxy reads it is understood as it is."""
    config = parse_config(
        KUBE_PROXY
        | {
            "mode": "iptables",
            "clusterCIDR": "10.244.0.0/16,fd00:10:244::/56",
            "hostnameOverride": "Worker-1",
            "iptables": {"masqueradeAll": True, "masqueradeBit": 10, "syncPeriod": "1m30s", "minSyncPeriod": "100ms"},
            "conntrack": {"tcpBeLiberal": True, "maxPerCore": 32768},
            "nodePortAddresses": ["primary"],
            "detectLocalMode": "BridgeInterface",
            "detectLocal": {"bridgeInterface": "cni0"},
            "clientConnection": {"kubeconfig": "/var/lib/kube-proxy/kubeconfig.conf", "qps": 5},
        }
    )
    settings = config.services
    assert config.kubeconfig == "/var/lib/kube-proxy/kubeconfig.conf"
    assert config.node_name == "worker-1"
    assert (config.sync_period, config.min_sync_period) == (90.0, 0.1)
    assert settings.cluster_cidrs == (Prefix.parse("10.244.0.0/16"), Prefix.parse("fd00:10:244::/56"))
    assert (settings.mark, settings.masquerade_all, settings.tcp_be_liberal) == (1 << 10, True, True)
    assert (settings.node_port_addresses, settings.detect_local_mode) == ("primary", "BridgeInterface")
    assert config.notes == ("clientConnection.qps is stated and changes nothing in this version",)
    assert config.conntrack == ConntrackOptions(max_per_core=32768, tcp_be_liberal=True)


def test_overlay_section():
    """The overlay's net-conf fields and our own beside them are both taken."""
    config = parse_config(
        node(
            overlay={
                "Network": "10.244.0.0/16",
                "Backend": {"Type": "host-gw"},
                "iface": "eth1",
                "noMasquerade": ["10.0.0.0/8"],
            }
        )
    )
    assert config.overlay.net_conf.backend.type == "host-gw"
    assert (config.overlay.iface, config.overlay.no_masquerade) == ("eth1", (Prefix.parse("10.0.0.0/8"),))
    assert parse_config(node()).overlay is None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "must be a NodeConfiguration or a KubeProxyConfiguration, is list"),
        ({"kind": "Pod"}, "kind: must be NodeConfiguration or KubeProxyConfiguration, is 'Pod'"),
        (NODE | {"apiVersion": "v1"}, "apiVersion: must be nodeplane.dev/v1alpha1, is 'v1'"),
        (node(servces={}), "servces: unknown field; there are"),
        (node(services={"clusterCIRD": "10.0.0.0/8"}), "services.clusterCIRD: unknown field"),
        (
            node(services={"iptables": {"masqueradeBit": "x"}}),
            "services.iptables.masqueradeBit: expected `int | null`, got `str` (is 'x')",
        ),
        (
            node(services={"iptables": {"masqueradeBit": 32}}),
            "services.iptables.masqueradeBit: must be between 0 and 31, is 32",
        ),
        (
            node(services={"iptables": {"syncPeriod": "30"}}),
            "services.iptables.syncPeriod: must be a duration such as 30s or 1m, is '30'",
        ),
        (
            node(services={"iptables": {"syncPeriod": "1s", "minSyncPeriod": "2s"}}),
            "services.iptables.minSyncPeriod: must not be greater than syncPeriod, is 2 s",
        ),
        (node(services={"mode": "xdp"}), "services.mode: must be one of iptables, ipvs, nftables, ebpf, is 'xdp'"),
        (node(serviceOptions={"cgroup": "here"}), "serviceOptions.cgroup: must be an absolute path, is 'here'"),
        (node(services={"clusterCIDR": "10.244.0.0/33"}), "services.clusterCIDR: must be a CIDR, is '10.244.0.0/33'"),
        (
            node(services={"nodePortAddresses": ["primary", "10.0.0.0/8"]}),
            "services.nodePortAddresses: primary stands alone or not at all, is ['primary', '10.0.0.0/8']",
        ),
        (node(services={"nodePortAddresses": ["10.0.0.0/8", "x"]}), "services.nodePortAddresses[1]: must be a CIDR, is 'x'"),
        (
            node(services={"detectLocalMode": "BridgeInterface"}),
            "services.detectLocal.bridgeInterface: must be set with detectLocalMode BridgeInterface",
        ),
        (
            node(policy={"enabled": True, "mode": "ebpf"}),
            "policy.mode: must be nftables or iptables, is 'ebpf'",
        ),
        (
            node(policy={"enabled": True, "mode": "iptables"}, services={"mode": "ipvs"}),
            "policy.mode: iptables cannot judge what services.mode ipvs sends to Services; nftables can",
        ),
        (node(iptablesVariant="ebtables"), "iptablesVariant: must be auto, legacy or nft, is 'ebtables'"),
        (node(overlay={"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec"}}), "overlay.Backend.Type"),
        (node(overlay={"Network": "nonsense"}), "overlay.Network"),
        (node(overlay={"Network": "10.244.0.0/16", "ifaces": "eth0"}), "overlay.ifaces"),
    ],
)
def test_errors_name_path_and_value(raw, message):
    """Each mistake gets one line with the path and what stands there."""
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert str(caught.value).startswith(message)


def test_errors_name_the_file(tmp_path):
    """A file that is missing, or is not YAML, is named."""
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    for path in (broken, tmp_path / "missing.yaml"):
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_notes_subnet_lengths_without_etcd():
    """Fields that only matter to a registry that hands out subnets are named as not used while Node objects do that."""
    overlay = {"Network": "10.244.0.0/16", "SubnetLen": 24, "publicIP": "192.0.2.1"}
    said = read_overlay(overlay).notes
    names = ["overlay.SubnetLen/SubnetMin/SubnetMax", "overlay.publicIP/publicIPv6"]
    assert [note.partition(":")[0] for note in said] == names
    assert read_overlay({**overlay, "registry": {"type": "etcd"}}).notes == ()


@pytest.mark.parametrize(
    ("overlay", "words"),
    [
        ({"registry": {"endpoints": ["http://10.0.0.1:2379"]}}, "overlay.registry.type: must be etcd for endpoints"),
        ({"registry": {"type": "etcd", "endpoints": ["10.0.0.1"]}}, "overlay.registry.endpoints[0]: must be like https://"),
        ({"registry": {"type": "etcd", "certFile": "c"}}, "overlay.registry.certFile: goes with keyFile"),
        ({"registry": {"type": "etcd", "username": "u"}}, "overlay.registry.username: goes with passwordFile"),
        ({"registry": {"type": "etcd", "leaseRenewMargin": "1s"}}, "overlay.registry.leaseRenewMargin: must be between 1m"),
        ({"publicIP": "fd00::1"}, "overlay.publicIP: must be an IPv4 address, is 'fd00::1'"),
    ],
)
def test_refuses_a_wrong_overlay(overlay, words):
    """What cannot be meant in the overlay section is an error that starts with its path."""
    with pytest.raises(ConfigError) as caught:
        read_overlay({"Network": "10.244.0.0/16", **overlay})
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ServerOptions()),
        ({"bindAddress": "::"}, ServerOptions(Bind("::", 10256), Bind("::1", 10249))),
        ({"healthzBindAddress": "192.168.1.1"}, ServerOptions(healthz=Bind("192.168.1.1", 10256))),
        ({"healthzBindAddress": ":0", "metricsBindAddress": "[::]:9"}, ServerOptions(Bind("0.0.0.0", 0), Bind("::", 9))),
        ({"metricsBindAddress": "fd00::1"}, ServerOptions(metrics=Bind("fd00::1", 10249))),
        (
            {"metricsBindAddress": "[fd00::1]", "bindAddressHardFail": True},
            ServerOptions(metrics=Bind("fd00::1", 10249), hard_fail=True),
        ),
    ],
)
def test_where_servers_listen(fields, expected):
    """Addresses are taken with and without ports, of both families; port 0 is nowhere."""
    assert parse_config(KUBE_PROXY | fields).servers == expected


def test_what_is_about_the_agent_itself():
    """Connection tracking, logs and the OOM score are taken as kube-proxy takes them."""
    conntrack = {"min": 0, "tcpEstablishedTimeout": "2h", "tcpCloseWaitTimeout": "0s", "udpTimeout": "30s"}
    raw = {"conntrack": conntrack, "logging": {"format": "json", "verbosity": 4, "flushFrequency": "5s"}, "oomScoreAdj": -999}
    config = parse_config(KUBE_PROXY | raw)
    assert config.conntrack == ConntrackOptions(least=0, tcp_established=7200.0, tcp_close_wait=0.0, udp=30.0)
    assert (config.logs, config.oom_score) == (LogOptions("json", 4), -999)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"healthzBindAddress": "localhost:1"}, "services.healthzBindAddress: must be like 0.0.0.0:10256, is 'localhost:1'"),
        ({"metricsBindAddress": "::1:99999x"}, "services.metricsBindAddress: must be like 127.0.0.1:10249"),
        (
            {"metricsBindAddress": "1.2.3.4:70000"},
            "services.metricsBindAddress: the port must be between 0 and 65535, is 70000",
        ),
        ({"bindAddress": "all"}, "services.bindAddress: must be an address, is 'all'"),
        ({"conntrack": {"min": -1}}, "services.conntrack.min: must not be negative, is -1"),
        ({"conntrack": {"udpTimeout": "1"}}, "services.conntrack.udpTimeout: must be a duration such as 30s or 1m, is '1'"),
        ({"logging": {"format": "xml"}}, "services.logging.format: invalid enum value 'xml' (is 'xml')"),
        ({"logging": {"verbosity": -1}}, "services.logging.verbosity: must not be negative, is -1"),
        ({"oomScoreAdj": 1001}, "services.oomScoreAdj: must be between -1000 and 1000, is 1001"),
    ],
)
def test_what_is_wrong_about_the_agent_itself(fields, message):
    """Each of these fields names its path and value when it is wrong."""
    with pytest.raises(ConfigError) as caught:
        parse_config(node(services=fields))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("mode", "options", "wanted"),
    [
        ("ebpf", {}, True),
        ("ebpf", {"shortLane": False}, False),
        ("nftables", {}, False),
        ("nftables", {"shortLane": True}, False),
    ],
)
def test_the_short_lane_is_of_mode_ebpf(mode, options, wanted):
    """Only mode ebpf has a short lane, unless it is switched off."""
    assert parse_config(node(services={"mode": mode}, serviceOptions=options)).short_lane is wanted
