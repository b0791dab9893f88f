"""A thousand changes, the agent killed in the middle of them: the kernel ends up as if it had been programmed once, afresh."""

import json
import random
import re
import subprocess
import threading

import pytest
from forked_agent import ForkedAgent
from object_files import Objects
from service_node import ServiceNode

from kernelstate.linux import netns as namespaces

pytestmark = pytest.mark.kernel

CHANGES = 1000
KILLS = 25
SERVICES = 12
NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "n1"},
    "spec": {"podCIDRs": ["10.244.0.0/16", "fd00:244::/32"]},
    "status": {"addresses": [{"type": "InternalIP", "address": "192.168.1.1"}]},
}


def service(number, draw):
    """Return a Service that has a bit of everything."""
    kind = draw.choice(["ClusterIP", "ClusterIP", "NodePort", "LoadBalancer"])
    spec = {
        "type": kind,
        "clusterIP": f"10.96.0.{number}",
        "ports": [
            {"name": "a", "protocol": draw.choice(["TCP", "UDP"]), "port": 80, "targetPort": 8080}
            | ({"nodePort": 30000 + number} if kind != "ClusterIP" else {})
        ],
        "internalTrafficPolicy": draw.choice(["Cluster", "Cluster", "Local"]),
    }
    if kind != "ClusterIP":
        spec["externalTrafficPolicy"] = draw.choice(["Cluster", "Local"])
    if draw.random() < 0.2:
        spec |= {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}}
    if kind == "LoadBalancer" and draw.random() < 0.5:
        spec["loadBalancerSourceRanges"] = ["198.51.100.0/24", "10.0.0.0/8"]
    found = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": f"s{number}", "namespace": "default"}, "spec": spec}
    if kind == "LoadBalancer":
        found["status"] = {"loadBalancer": {"ingress": [{"ip": f"203.0.113.{number}"}]}}
    return found


def endpoints(name, addresses, port):
    """Return an EndpointSlice of a Service."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [a], "nodeName": "n1", "conditions": {"ready": True}} for a in addresses],
        "ports": [{"name": "a", "protocol": p, "port": port} for p in ("TCP", "UDP")],
    }


def stay():
    """Return the Service whose only endpoint stays: pod 1."""
    spec = {"clusterIP": "10.96.0.77", "ports": [{"name": "a", "protocol": "TCP", "port": 7, "targetPort": 7000}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "stay", "namespace": "default"}, "spec": spec}


def change(objects, draw):
    """Change one Service, its endpoints, or take it away."""
    number = draw.randrange(1, SERVICES + 1)
    pods = [f"10.244.{draw.randrange(1, 4)}.{draw.randrange(2, 30)}" for _ in range(draw.randrange(5))]
    match draw.randrange(6):
        case 0:
            objects.remove(f"s{number}")
        case 1 | 2:
            objects.put(service(number, draw), endpoints(f"s{number}", sorted(set(pods)), 8080))
        case _:
            objects.put(endpoints(f"s{number}", sorted(set(pods)), 8080))


def dump(space):
    """Return everything a node holds for Services, in an order of its own, without counters and handles."""

    def output(*command):
        return namespaces.run(space, list(command))

    rules = []
    for tool in ("iptables-legacy-save", "iptables-nft-save", "ip6tables-legacy-save", "ip6tables-nft-save"):
        rules += [tool + re.sub(r"\[\d+:\d+\]", "", line) for line in output(tool).splitlines() if "KUBE-" in line]
    tables = []
    for family in ("ip", "ip6"):
        listed = subprocess.run(
            ["ip", "netns", "exec", space, "nft", "-j", "list", "table", family, "nodeplane"], capture_output=True, check=False
        )
        if listed.returncode == 0:
            tables += sorted(json.dumps(_plain(one), sort_keys=True) for one in json.loads(listed.stdout)["nftables"][1:])
    sets = sorted(re.sub(r"(initval|bucketsize|hashsize) \S+ ?", "", line) for line in output("ipset", "save").splitlines())
    return {"rules": sorted(rules), "tables": tables, "sets": sets, "servers": _servers(space)}


def _plain(value):
    """Drop handles; sort what has no order: elements of a set. ``nft`` guesses whose port a rule looks at: any transport's."""
    if isinstance(value, dict):
        if value.get("field") == "dport":
            return {"field": "dport"}
        dynamic = "dynamic" in value.get("flags", ()) if isinstance(value.get("flags"), list) else False
        return {
            k: sorted(json.dumps(_plain(e), sort_keys=True) for e in v) if k == "elem" else _plain(v)
            for k, v in value.items()
            if k != "handle" and not (dynamic and k == "elem")
        }
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _servers(space):
    text = namespaces.run(space, ["sh", "-c", "cat /proc/self/net/ip_vs 2>/dev/null || true"])
    return sorted(re.sub(r"(\s+\d+){2}\s*$", "", line) for line in text.splitlines())  # without connection counts


class Conversation(threading.Thread):
    """One connection that is kept open from a client to the Service: every line must come back."""

    def __init__(self, rig):
        super().__init__(daemon=True)
        server = rig.listen(1, 7000)
        self.client = rig.socket(rig.pods[2])
        self.answering = threading.Thread(target=self._echo, args=(server,), daemon=True)
        self.answering.start()
        self.client.connect(("10.96.0.77", 7))
        self.said, self.ended, self.fault = 0, threading.Event(), None

    @staticmethod
    def _echo(server):
        one, _ = server.accept()
        with one:
            while data := one.recv(4096):
                one.sendall(data)

    def run(self):
        try:
            while not self.ended.wait(0.01):
                self.client.sendall(b"%8d" % self.said)
                heard = b""
                while len(heard) < 8:
                    heard += self.client.recv(8 - len(heard)) or b"closed!!"
                assert heard == b"%8d" % self.said, heard
                self.said += 1
        except Exception as error:
            self.fault = error

    def end(self):
        self.ended.set()
        self.join(10)
        assert self.fault is None
        return self.said


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_changes_and_kills(make_netns, tmp_path, mode):
    """A thousand changes with the agent killed at random: the node holds what a fresh one holds, and an open connection lives."""
    run_changes(make_netns, tmp_path, mode, CHANGES, KILLS)


@pytest.mark.ipvs
def test_changes_and_kills_in_ipvs(make_netns, tmp_path):
    """The same in IPVS mode, with fewer changes: where the kernel has no IPVS this runs in a slow machine."""
    run_changes(make_netns, tmp_path, "ipvs", 80, 5)


def run_changes(make_netns, tmp_path, mode, changes, kills):
    """Do it in one mode."""
    draw = random.Random(36)
    rig, fresh = ServiceNode(make_netns, pods=3), ServiceNode(make_netns, pods=3)
    objects = Objects(tmp_path / "objects")
    objects.put(NODE, stay(), endpoints("stay", ["10.244.1.2"], 7000))
    agent = ForkedAgent(rig.node, objects.folder, tmp_path / "status.json", {"mode": mode})
    other = ForkedAgent(fresh.node, objects.folder, tmp_path / "fresh.json", {"mode": mode})
    try:
        agent.start()
        agent.wait(objects.generation)
        conversation = Conversation(rig)
        conversation.start()
        deaths = set(draw.sample(range(changes), kills))
        for number in range(changes):
            change(objects, draw)
            if number in deaths:
                agent.kill()
                agent.start()
            elif number % 50 == 0:
                agent.wait(objects.generation)
        agent.wait(objects.generation)
        assert conversation.end() > 10
        other.start()
        other.wait(objects.generation)
        held, wanted = dump(rig.node), dump(fresh.node)
        assert held == wanted
        assert any(wanted.values())
    finally:
        agent.kill()
        other.kill()
        rig.close()
        fresh.close()
