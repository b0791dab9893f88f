"""The agent does everything with the capabilities that its systemd unit names, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import running
from bench.running import configuration, running_agent
from kernelstate.linux import netns as namespaces
from nodeplane.status import read_status

pytestmark = pytest.mark.kernel

UNIT = Path(__file__).parents[2] / "deploy/nodeplane.service"
CAPABILITIES = (
    next(line for line in UNIT.read_text().splitlines() if line.startswith("CapabilityBoundingSet=")).split("=")[1].split()
)
UNDERLAY = "link add eth0 type veth peer name p0\naddr add 192.168.60.1/24 dev eth0\nlink set eth0 up\nlink set p0 up\n"
OVERLAY = {"Network": "10.244.0.0/16", "iface": "eth0", "ipMasq": True}
OBJECTS = [
    *(
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": f"node-{i}",
                "annotations": {
                    "flannel.alpha.coreos.com/backend-type": backend,
                    "flannel.alpha.coreos.com/backend-data": data,
                    "flannel.alpha.coreos.com/public-ip": f"192.168.60.{i}",
                    "flannel.alpha.coreos.com/kube-subnet-manager": "true",
                },
            },
            "spec": {"podCIDR": f"10.244.{i}.0/24", "podCIDRs": [f"10.244.{i}.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": f"192.168.60.{i}"}]},
        }
        for i, backend, data in ((1, "vxlan", "null"), (2, "vxlan", '{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}'))
    ),
    {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": "default", "name": "web", "labels": {"app": "web"}},
        "spec": {"nodeName": "node-1", "containers": [{"name": "c", "image": "i"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.244.1.5"}]},
    },
    {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "default", "name": "closed"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    },
]


def confine(monkeypatch, capabilities):
    """Have agents started with these capabilities and no others."""
    less = "".join(f",+{name.removeprefix('CAP_').lower()}" for name in capabilities)
    start = running.mounts.popen

    def popen(name, view, argv, **rest):
        return start(name, view, ["setpriv", "--inh-caps=-all", f"--bounding-set=-all{less}", *argv], **rest)

    monkeypatch.setattr(running.mounts, "popen", popen)


@pytest.fixture
def node(netns, tmp_path):
    """Return how to run an agent once, on a node with an uplink, and what it says of itself."""
    namespaces.run(netns, ["ip", "-batch", "-"], stdin=UNDERLAY)
    (tmp_path / "objects").mkdir()

    def run(mode, backend):
        for i, one in enumerate(OBJECTS):
            text = json.dumps(one).replace('backend-type": "vxlan"', f'backend-type": "{backend}"')
            (tmp_path / f"objects/{i}.json").write_text(text)
        policy, overlay = {"enabled": True, "mode": mode}, {**OVERLAY, "Backend": {"Type": backend}}
        (tmp_path / "run/status.json").unlink(missing_ok=True)
        with running_agent(netns, tmp_path, {**configuration(mode), "policy": policy, "overlay": overlay}) as agent:
            agent.wait(agent.is_synced, "the first sync")
            return read_status(tmp_path / "run/status.json")

    return run


@pytest.mark.parametrize("backend", ["vxlan", "udp"])
@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_capabilities_suffice(node, monkeypatch, mode, backend):
    """With these capabilities Services, overlay, source guard and policies are in the kernel, also for an agent that follows another."""
    confine(monkeypatch, CAPABILITIES)
    for _ in range(2):
        status = node(mode, backend)
        assert (status.errors, status.object_errors, status.unguarded, status.isolated) == ((), (), "", 1)
        assert [peer.reach for peer in status.peers] == [backend]


def test_without_bpf(node, monkeypatch):
    """Without those for BPF the rest is as ever, and the status says what is missing."""
    confine(monkeypatch, ["CAP_NET_ADMIN", "CAP_NET_RAW"])
    status = node("nftables", "vxlan")
    assert (status.errors, status.isolated, [peer.reach for peer in status.peers]) == ((), 1, ["vxlan"])
    assert "not permitted" in status.unguarded
