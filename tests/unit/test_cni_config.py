"""The plugin's configuration: what is refused, and what flannel's and ours are rendered into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nodeplane.cni.config import check_config, data_dir, is_rendered, render, stated_mac
from nodeplane.cni.protocol import CniError
from nodeplane.cni.subnet_env import parse_subnet_env

V4 = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n"
V6 = "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00:0:0:1::1/64\n"
REST = "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
RANGES = [[{"subnet": "10.244.1.0/24"}]]
ROUTE = {"dst": "10.244.0.0/16"}


def conf(**fields: Any) -> dict[str, Any]:
    return {"cniVersion": "1.1.0", "name": "cbr0", "type": "nodeplane-cni", **fields}


@pytest.fixture
def env(tmp_path: Path) -> str:
    file = tmp_path / "subnet.env"
    file.write_text(V4 + REST)
    return str(file)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": ""}, "name: must be letters, digits, '_', '.' and '-', is ''"),
        ({"name": "a/b"}, "name: must be letters, digits, '_', '.' and '-', is 'a/b'"),
        ({"mode": "vlan"}, "mode: must be routed or bridge, is 'vlan'"),
        ({"mode": 1}, "mode: must be a string, is 1"),
        ({"mtu": True}, "mtu: must be a whole number, is True"),
        ({"mtu": 67}, "mtu: must be at least 68, is 67"),
        ({"ipam": "host-local"}, "ipam: must be an object, is 'host-local'"),
        ({"ipMasq": True}, "ipMasq: must be false, is true: masquerading is the agent's (overlay.ipMasq)"),
        ({"bridge": "cni0"}, "bridge: must be left to mode \"bridge\", is 'cni0'"),
        ({"hairpinMode": True}, 'hairpinMode: must be left to mode "bridge", is True'),
        ({"mode": "bridge", "bridge": "a" * 16}, "bridge: must be a link's name, is 'aaaaaaaaaaaaaaaa'"),
        ({"mode": "bridge", "delegate": {}}, "mode: must be left out beside delegate, is 'bridge'"),
        ({"delegate": {"name": "x"}}, "delegate.name: must be left to this plugin, is 'x'"),
        ({"delegate": {"ipam": {}}}, "delegate.ipam: must be left to this plugin, is {}"),
        ({"delegate": {"type": "../sh"}}, "delegate.type: must be a plugin's name, is '../sh'"),
        ({"delegate": {"hairpinMode": "yes"}}, "delegate.hairpinMode: must be true or false, is 'yes'"),
    ],
)
def test_refused(fields: dict[str, Any], words: str) -> None:
    """What cannot be meant is refused with code 7, naming field and value."""
    with pytest.raises(CniError) as error:
        check_config(conf(**fields))
    assert (error.value.code, error.value.message) == (7, words)


def test_what_others_put_in_is_let_through() -> None:
    """Keys of the runtime and of other plugins are none of our business."""
    check_config(conf(capabilities={"ips": True}, disableCheck=False, loadOnlyInlinedPlugins=True, **{"example.com/x": 1}))


ROUTED = {"type": "nodeplane-cni", "mode": "routed", "isDefaultGateway": True}
BRIDGE = {
    "type": "nodeplane-cni",
    "mode": "bridge",
    "bridge": "cni0",
    "isGateway": True,
    "isDefaultGateway": True,
    "hairpinMode": True,
    "forceAddress": False,
}
SHORT_BRIDGE = {**BRIDGE, "isDefaultGateway": False, "hairpinMode": False}
FLANNEL_IPAM = {"type": "host-local", "ranges": RANGES, "routes": [ROUTE]}


@pytest.mark.parametrize(
    ("fields", "rendered"),
    [
        pytest.param({}, {**ROUTED, "mtu": 1450, "ipam": {"type": "host-local", "ranges": RANGES}}, id="ours"),
        pytest.param(
            {"mtu": 1400, "isDefaultGateway": False, "ipam": {"routes": [{"dst": "192.0.2.0/24"}]}},
            {
                **ROUTED,
                "isDefaultGateway": False,
                "mtu": 1400,
                "ipam": {"type": "host-local", "ranges": RANGES, "routes": [{"dst": "192.0.2.0/24"}]},
            },
            id="stated values count",
        ),
        pytest.param({"ipam": {"type": "static"}}, {**ROUTED, "mtu": 1450, "ipam": {"type": "static"}}, id="other addresses"),
        pytest.param(
            {"mode": "bridge"}, {**BRIDGE, "mtu": 1450, "ipam": {"type": "host-local", "ranges": RANGES}}, id="bridge"
        ),
        pytest.param(
            {"delegate": {"hairpinMode": True, "isDefaultGateway": True}},
            {**BRIDGE, "mtu": 1450, "ipam": FLANNEL_IPAM},
            id="flannel's own conflist",
        ),
        pytest.param({"delegate": {}}, {**SHORT_BRIDGE, "mtu": 1450, "ipam": FLANNEL_IPAM}, id="the bridge plugin's defaults"),
        pytest.param(
            {"delegate": {"type": "bridge", "mtu": 1400}},
            {"type": "bridge", "isGateway": True, "ipMasq": False, "mtu": 1400, "ipam": FLANNEL_IPAM},
            id="bridge by name",
        ),
        pytest.param(
            {"delegate": {"vlan": 5}},
            {"type": "bridge", "vlan": 5, "isGateway": True, "ipMasq": False, "mtu": 1450, "ipam": FLANNEL_IPAM},
            id="what only the bridge plugin knows",
        ),
        pytest.param(
            {"delegate": {"ipMasq": True}},
            {"type": "bridge", "isGateway": True, "ipMasq": True, "mtu": 1450, "ipam": FLANNEL_IPAM},
            id="masquerading by the plugin",
        ),
        pytest.param(
            {"delegate": {"type": "ptp"}, "ipam": {"routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "ptp", "ipMasq": False, "mtu": 1450, "ipam": {**FLANNEL_IPAM, "routes": [{"dst": "0.0.0.0/0"}, ROUTE]}},
            id="another plugin",
        ),
    ],
)
def test_rendered(env: str, fields: dict[str, Any], rendered: dict[str, Any]) -> None:
    """Ours and flannel's configurations become what is to be done, and ours are then complete in themselves."""
    stated = conf(subnetFile=env, **fields)
    check_config(stated)
    found = render(stated)
    assert found == {"cniVersion": "1.1.0", "name": "cbr0", **rendered}
    if found["type"] == "nodeplane-cni":
        check_config(found)
        assert is_rendered(found)
        assert render(found) == found


def test_no_masquerading_by_the_agent(tmp_path: Path) -> None:
    """Where subnet.env says that the agent does not masquerade, flannel has the bridge plugin do it, and so it is here."""
    file = tmp_path / "subnet.env"
    file.write_text(V4 + REST.replace("true", "false"))
    found = render(conf(subnetFile=str(file), delegate={"hairpinMode": True}))
    assert (found["type"], found["ipMasq"]) == ("bridge", True)


def test_dual_stack(tmp_path: Path) -> None:
    """Each family has a range of its own, so that a pod gets an address of each; routes go to both networks."""
    file = tmp_path / "subnet.env"
    file.write_text(V4 + V6 + REST)
    found = render(conf(subnetFile=str(file), delegate={}))["ipam"]
    assert found["ranges"] == [[{"subnet": "10.244.1.0/24"}], [{"subnet": "fc00:0:0:1::/64"}]]
    assert found["routes"] == [{"dst": "10.244.0.0/16"}, {"dst": "fc00::/48"}]


def test_what_the_runtime_knows_goes_along(env: str) -> None:
    """Addresses and MAC that a runtime asks for, and dns, are part of what is rendered; prevResult is not."""
    extra = {"runtimeConfig": {"ips": ["10.244.1.9"]}, "args": {"cni": {"ips": []}}, "dns": {"domain": "x"}, "dataDir": "/d"}
    found = render(conf(subnetFile=env, prevResult={"ips": []}, **extra))
    assert {key: found[key] for key in extra} == extra
    assert "prevResult" not in found
    assert data_dir(found) == "/d/cbr0"


def test_without_subnet_env(tmp_path: Path) -> None:
    """While subnet.env is missing, ADD is to be tried again later, and the error says whom to wait for."""
    with pytest.raises(CniError) as error:
        render(conf(subnetFile=str(tmp_path / "subnet.env")))
    assert error.value.code == 11
    assert "subnet.env is missing: the agent has not yet said" in error.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (REST, "f: FLANNEL_NETWORK: must be stated, for either family, is 'missing'"),
        ("FLANNEL_NETWORK=10.0.0.0/8\n" + REST, "f: FLANNEL_SUBNET: must be stated, for either family, is 'missing'"),
        (V4 + "FLANNEL_IPMASQ=true", "f: FLANNEL_MTU: must be a number of at least 68, is 'missing'"),
        (V4 + "FLANNEL_MTU=9\nFLANNEL_IPMASQ=true", "f: FLANNEL_MTU: must be a number of at least 68, is '9'"),
        (V4 + "FLANNEL_MTU=1450", "f: FLANNEL_IPMASQ: must be true or false, is 'missing'"),
        (V4.replace("10.244.1.1/24", "here") + REST, "f: FLANNEL_SUBNET: must be an address with its length, is 'here'"),
        (V4.replace("10.244.0.0", "10.244.0.1") + REST, "f: FLANNEL_NETWORK: must be networks, is '10.244.0.1/16'"),
    ],
)
def test_subnet_env_refused(text: str, words: str) -> None:
    """A subnet.env that lacks something, or says nonsense, is named with its line: no pod gets a wrong address from it."""
    with pytest.raises(CniError) as error:
        parse_subnet_env(text, "f")
    assert (error.value.code, error.value.message) == (7, words)


def test_several_networks() -> None:
    """FLANNEL_NETWORK may be a list, as for flannel."""
    text = V4.replace("10.244.0.0/16", "10.244.0.0/16,10.245.0.0/16") + REST
    assert parse_subnet_env(text, "f").networks == ("10.244.0.0/16", "10.245.0.0/16")


@pytest.mark.parametrize(
    ("fields", "args", "mac"),
    [
        ({}, {}, ""),
        ({"runtimeConfig": {"mac": "02-00-00-00-00-AA"}}, {"MAC": "02:00:00:00:00:01"}, "02:00:00:00:00:aa"),
        ({"args": {"cni": {"mac": "02:00:00:00:00:02"}}}, {"MAC": "02:00:00:00:00:01"}, "02:00:00:00:00:02"),
        ({}, {"MAC": "02:00:00:00:00:01"}, "02:00:00:00:00:01"),
    ],
)
def test_stated_mac(fields: dict[str, Any], args: dict[str, str], mac: str) -> None:
    """A MAC comes from the capability, then from args, then from CNI_ARGS."""
    assert stated_mac(conf(**fields), args) == mac


@pytest.mark.parametrize("mac", ["01:00:5e:00:00:01", "02:00:00:00:00", "02:00:00:00:00:0g", 5])
def test_a_mac_of_no_host(mac: object) -> None:
    """A multicast MAC, or none at all, is refused."""
    with pytest.raises(CniError, match="mac: must be the MAC of one host"):
        stated_mac(conf(runtimeConfig={"mac": mac}), {})
