"""kube-proxy's command line: its flags say what its file says, the file beats them, and nothing stated is passed over in silence."""

from __future__ import annotations

import pytest
import yaml
from msgspec.structs import replace

from nodeplane.__main__ import main, make_parser
from nodeplane.commands import Usage
from nodeplane.config import parse_config
from nodeplane.config_fields import ConfigError
from nodeplane.config_node import LogOptions
from nodeplane.flags import FLAGS, REFUSED, UNUSED, read_config

SAMPLES = {
    "proxy-mode": ("nftables", {"mode": "nftables"}),
    "cluster-cidr": ("10.244.0.0/16,fd00::/56", {"clusterCIDR": "10.244.0.0/16,fd00::/56"}),
    "detect-local-mode": ("NodeCIDR", {"detectLocalMode": "NodeCIDR"}),
    "pod-bridge-interface": ("cni0", {"detectLocal": {"bridgeInterface": "cni0"}}),
    "pod-interface-name-prefix": ("veth", {"detectLocal": {"interfaceNamePrefix": "veth"}}),
    "nodeport-addresses": ("10.0.0.0/8, 192.168.0.0/16", {"nodePortAddresses": ["10.0.0.0/8", "192.168.0.0/16"]}),
    "masquerade-all": ("true", {"iptables": {"masqueradeAll": True}}),
    "iptables-masquerade-bit": ("9", {"iptables": {"masqueradeBit": 9}}),
    "iptables-localhost-nodeports": ("false", {"iptables": {"localhostNodePorts": False}}),
    "iptables-sync-period": ("1m30s", {"iptables": {"syncPeriod": "1m30s"}}),
    "iptables-min-sync-period": ("2s", {"iptables": {"minSyncPeriod": "2s"}}),
    "ipvs-sync-period": ("50s", {"ipvs": {"syncPeriod": "50s"}}),
    "ipvs-min-sync-period": ("3s", {"ipvs": {"minSyncPeriod": "3s"}}),
    "ipvs-scheduler": ("mh", {"ipvs": {"scheduler": "mh"}}),
    "ipvs-exclude-cidrs": ("10.1.0.0/16", {"ipvs": {"excludeCIDRs": ["10.1.0.0/16"]}}),
    "ipvs-strict-arp": ("true", {"ipvs": {"strictARP": True}}),
    "ipvs-tcp-timeout": ("15m", {"ipvs": {"tcpTimeout": "15m"}}),
    "ipvs-tcpfin-timeout": ("2m", {"ipvs": {"tcpFinTimeout": "2m"}}),
    "ipvs-udp-timeout": ("5m", {"ipvs": {"udpTimeout": "5m"}}),
    "bind-address": ("::", {"bindAddress": "::"}),
    "healthz-bind-address": ("0.0.0.0:1", {"healthzBindAddress": "0.0.0.0:1"}),
    "metrics-bind-address": ("0.0.0.0:2", {"metricsBindAddress": "0.0.0.0:2"}),
    "bind-address-hard-fail": ("true", {"bindAddressHardFail": True}),
    "oom-score-adj": ("-999", {"oomScoreAdj": -999}),
    "conntrack-max-per-core": ("1000", {"conntrack": {"maxPerCore": 1000}}),
    "conntrack-min": ("2000", {"conntrack": {"min": 2000}}),
    "conntrack-tcp-timeout-established": ("2h", {"conntrack": {"tcpEstablishedTimeout": "2h"}}),
    "conntrack-tcp-timeout-close-wait": ("3h", {"conntrack": {"tcpCloseWaitTimeout": "3h"}}),
    "conntrack-tcp-be-liberal": ("true", {"conntrack": {"tcpBeLiberal": True}}),
    "conntrack-udp-timeout": ("10s", {"conntrack": {"udpTimeout": "10s"}}),
    "conntrack-udp-timeout-stream": ("20s", {"conntrack": {"udpStreamTimeout": "20s"}}),
}
"""For each flag a value, and the file that says the same."""


def config_of(*arguments: str):
    return read_config(make_parser().parse_args(["agent", "--node", "n1", *arguments]))


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
@pytest.mark.parametrize("mode", ["iptables", "ipvs"])
def test_each_flag_says_what_the_file_says(flag, mode):
    """Every flag states its field, in each mode, and changes something in some mode."""
    value, fields = SAMPLES[flag.name]
    extra = {"mode": mode} if flag.name != "proxy-mode" else {}
    expected = parse_config({"kind": "KubeProxyConfiguration", **extra, **fields}, "n1")
    more = [f"--proxy-mode={mode}"] if extra else []
    assert config_of(*more, f"--{flag.name}={value}") == expected
    plain = [parse_config({"kind": "KubeProxyConfiguration", "mode": m}, "n1") for m in ("iptables", "ipvs")]
    changed = [parse_config({"kind": "KubeProxyConfiguration", **fields, "mode": m}, "n1") for m in ("iptables", "ipvs")]
    if flag.name not in {"proxy-mode", "pod-bridge-interface", "pod-interface-name-prefix"}:
        assert changed != plain or expected.mode == "nftables"


def test_every_flag_has_a_sample():
    """No flag is left out of this test."""
    assert {flag.name for flag in FLAGS} == SAMPLES.keys()


def test_iptables_flags_count_for_nftables():
    """As in kube-proxy there are no flags named nftables: those of iptables state it too."""
    config = config_of(
        "--proxy-mode", "nftables", "--masquerade-all", "--iptables-min-sync-period=2s", "--iptables-sync-period=40s"
    )
    assert (config.services.masquerade_all, config.min_sync_period, config.sync_period) == (True, 2.0, 40.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iptables-sync-period", "30"], "--iptables-sync-period: must be a duration"),
        (["--proxy-mode=nftables", "--iptables-sync-period", "30"], "--iptables-sync-period: must be a duration"),
        (["--proxy-mode", "ebtables"], "--proxy-mode: must be one of"),
        (["--nodeport-addresses", "10.0.0.0/8,x"], "--nodeport-addresses[1]: must be a CIDR, is 'x'"),
        (["--cluster-cidr", "10.0.0.0" * 2], "--cluster-cidr: must be a CIDR"),
        (["--conntrack-min=-1"], "--conntrack-min: must not be negative, is -1"),
        (["--healthz-bind-address", "here"], "--healthz-bind-address: must be like 0.0.0.0:10256, is 'here'"),
    ],
)
def test_an_error_names_the_flag(arguments, message):
    """A wrong value is answered with the flag it was given by, and the value."""
    with pytest.raises(ConfigError) as caught:
        config_of(*arguments)
    assert str(caught.value).startswith(message)


def test_the_file_beats_flags(tmp_path):
    """Beside --config only the node's name and logging count; every other flag is named as ignored."""
    file = tmp_path / "config.yaml"
    fields = {"mode": "ipvs", "hostnameOverride": "other", "logging": {"format": "text", "verbosity": 4}}
    file.write_text(yaml.safe_dump({"kind": "KubeProxyConfiguration", **fields}))
    config = config_of("--config", str(file), "--proxy-mode", "nftables", "--masquerade-all", "--logging-format=json")
    plain = parse_config({"kind": "KubeProxyConfiguration", **fields}, "n1")
    words = f"is ignored: --config {file} is given, and says it all"
    notes = (f"--proxy-mode {words}", f"--masquerade-all {words}")
    assert config == replace(plain, logs=LogOptions("json", 4), notes=notes)


@pytest.mark.parametrize("name", UNUSED)
def test_flags_that_change_nothing(name):
    """A flag of kube-proxy without a meaning here is accepted and answered with the reason."""
    assert config_of(f"--{name}=5").notes == (f"--{name} changes nothing here: {UNUSED[name]}",)


@pytest.mark.parametrize("name", REFUSED)
def test_flags_that_are_refused(name):
    """A flag that asks for something else than an agent is refused, with what to do instead."""
    with pytest.raises(Usage, match=f"^--{name} "):
        config_of(f"--{name}")


def test_a_line_as_kubeadm_writes_it(tmp_path):
    """The command line of kubeadm for kube-proxy is understood as it is."""
    file = tmp_path / "config.conf"
    file.write_text("kind: KubeProxyConfiguration\nhostnameOverride: x\n")
    args = make_parser().parse_args(["agent", f"--config={file}", "--hostname-override=Worker-7", "--v=2"])
    config = read_config(args)
    assert (config.node_name, config.notes, config.logs.verbosity) == ("worker-7", (), 2)


def test_bad_usage_is_exit_2(capsys):
    """A refused flag and a wrong value end with exit 2 and one line."""
    for arguments in (["--cleanup"], ["--conntrack-min=-1"]):
        assert main(["agent", "--objects", "/nonexistent", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
