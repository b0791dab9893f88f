"""Labs for real: up, in sync, answering, changed, and gone without a trace, whatever was killed meanwhile."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import patience
import pytest
from lab_source import SOURCES, up_options

from kernelstate.linux import netns
from netnslab import attaching, lab, plan, probe, processes, wiring
from netnslab import state as states
from netnslab.topology import BUNDLED

pytestmark = pytest.mark.kernel

SCENARIOS = BUNDLED.parent / "scenarios"
LIMIT = 120.0


def nodeplane(*args: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the program; with ``check`` a failure shows what it said."""
    command = [sys.executable, "-m", "nodeplane", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False, input=stdin)
    assert not check or done.returncode == 0, done.stderr
    return done


def traces() -> dict[str, Any]:
    """Return what a lab could leave on the host: links, routes, mounts, directories."""
    return {
        "links": sorted(p.name for p in Path("/sys/class/net").iterdir()),
        "routes": Path("/proc/net/route").read_text(),
        "mounts": [line for line in Path("/proc/mounts").read_text().splitlines() if "np-" not in line],
        "labs": states.LABS.parent.exists(),
        "flannel": Path("/run/flannel").exists(),
        "var": Path("/var/lib/nodeplane").exists(),
    }


def left_of(name: str) -> list[str]:
    """Return what is left of a lab: namespaces, processes, files."""
    processes_left = [
        entry.name
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit()
        and (
            f"/labs/{name}/".encode() in _command_line(entry)
            or f"netnslab.api.server\0{name}\0".encode() in _command_line(entry)
        )
    ]
    spaces = [n for n in netns.names() if n.startswith(f"np-{name}-")]
    return [*spaces, *processes_left, *(str(p) for p in [states.LABS / name] if p.exists())]


def _command_line(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def until(true: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Poll until something holds; whether it came to that."""
    return bool(patience.until(true, seconds))


@pytest.fixture
def name() -> Iterator[str]:
    """Return a lab's name; whatever is left of it afterwards is taken down."""
    name = f"t{os.getpid()}-{secrets.token_hex(2)}"
    yield name
    nodeplane("lab", "down", "--name", name, check=False)


@pytest.fixture(scope="module", params=SOURCES)
def three(request: pytest.FixtureRequest) -> Iterator[str]:
    """Bring up the default lab, for the tests that leave it as it is; its agents follow files, or an API server."""
    name = f"t{os.getpid()}-{secrets.token_hex(2)}"
    try:
        nodeplane("lab", "up", "--name", name, *up_options(request.param))
        yield name
    finally:
        nodeplane("lab", "down", "--name", name, check=False)


def status(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(nodeplane("lab", "status", "--name", name, "-o", "json").stdout)
    return found


def try_out(name: str, tmp_path: Path, *probes: dict[str, Any]) -> list[dict[str, Any]]:
    file = tmp_path / "probes.json"
    file.write_text(json.dumps(probes))
    done = nodeplane("lab", "probe", "--name", name, "--probes", str(file), "-o", "json")
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


# -- the cables alone, without agents --------------------------------------------------------------------------------


@pytest.fixture
def cables(name: str) -> states.LabState:
    """Lay the cables of the dual-stack topology, with its pods answering, and no agent."""
    planned = plan.read_plan("dual-stack", [], None, None)
    state = states.LabState(name, planned.topology)
    lab.plan_pods(state, planned.given)
    states.make_root(name)
    state.save()
    state.objects.mkdir()
    for node in state.topology.nodes:
        lab.agents.node_view(state, node.name).make()
        families = zip(("", "IPV6_"), state.topology.cluster.pod_cidrs, node.pod_cidrs, strict=True)
        lines = [f"FLANNEL_{f}NETWORK={network}\nFLANNEL_{f}SUBNET={subnet}\n" for f, network, subnet in families]
        said = "".join(lines) + "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        (state.node_dir(node.name) / "flannel/subnet.env").write_text(said)  # what an agent would say
    wiring.make_fixed(state)
    attaching.make_pods(state, state.pods)
    assert lab.answering.serve(state, state.pods) == []
    return state


def test_pods_of_one_node_need_no_agent(cables: states.LabState) -> None:
    """Over its routed veth a pod reaches its node and its neighbours, in IPv4 and IPv6, and they see who it is."""
    on_one = [p for p in cables.pods if p.node == "node-1"]
    first, second = on_one[0], on_one[1]
    probes = [probe.Probe(first.netns, ip, 9376, "TCP") for ip in second.ips]
    probes += [probe.Probe(cables.node_netns("node-1"), ip, 9376, "TCP") for ip in first.ips]
    found = [(a.connected, a.answered_by, a.source_seen) for a in probe.run_probes(probes)]
    node = cables.topology.nodes[0]
    assert found == [(True, second.key, ip) for ip in first.ips] + [(True, first.key, ip) for ip in node.ips]


def test_pods_of_other_nodes_need_one(cables: states.LabState) -> None:
    """Without an agent no node knows the way to another's pods: the lab itself routes between nodes only."""
    there = next(p for p in cables.pods if p.node == "node-2")
    here = next(p for p in cables.pods if p.node == "node-1")
    found = probe.run_probes([probe.Probe(here.netns, ip, 9376, "TCP", 0.5) for ip in there.ips])
    assert [a.connected for a in found] == [False, False]


def test_answers_to_silence_to_http_and_to_nonsense(cables: states.LabState) -> None:
    """A client that says nothing, or nonsense, gets the line; one that speaks HTTP gets it as a response."""
    pod = cables.pods[0]
    url = f"http://{pod.ips[0]}:9376/x"
    source = cables.node_netns(pod.node)
    line = f"{pod.key} {cables.topology.nodes[0].ips[0]}\n"
    said = netns.run(source, ["curl", "-s", "-m", "5", url])
    silent = "import socket; s = socket.create_connection(('{}', 9376), 5); print(s.makefile().read(), end='')"
    heard = netns.run(source, [sys.executable, "-c", silent.format(pod.ips[0])])
    nonsense = netns.call(source, probe.try_once, probe.Probe(source, pod.ips[0], 9376, "TCP"))
    assert (said, heard, nonsense.answered_by) == (line, line, pod.key)


def test_a_deleted_pods_connections_close_at_once(cables: states.LabState) -> None:
    """Taking a pod from the list ends its listening sockets and its open connections, and nobody else's."""
    gone, kept = [p for p in cables.pods if p.node == "node-1"][:2]
    source = cables.node_netns("node-1")
    lab.answering.serve(cables, [p for p in cables.pods if p.key != gone.key])
    found = probe.run_probes([probe.Probe(source, p.ips[0], 9376, "TCP") for p in (gone, kept)])
    assert [(a.answered_by, a.why) for a in found] == [(None, "ECONNREFUSED Connection refused"), (kept.key, "")]


# -- with agents -----------------------------------------------------------------------------------------------------


def test_status_holds_the_facts(three: str) -> None:
    """`lab status -o json` names nodes, pods, Services and the external client, all of them there and in sync."""
    found = status(three)
    assert sorted(found) == ["external", "kubeconfig", "name", "nodes", "pods", "services"]
    assert [(n["name"], n["ip"], n["pod_cidr"], n["synced"]) for n in found["nodes"]] == [
        (f"node-{i}", f"192.168.50.1{i}", f"10.244.{i}.0/24", True) for i in (1, 2, 3)
    ]
    assert len({n["agent_pid"] for n in found["nodes"]} - {None}) == 3
    assert len(found["pods"]) == 9
    spaces = {p["netns"] for p in [*found["pods"], *found["nodes"], found["external"]]}
    assert spaces <= set(netns.names())


def test_every_pod_reaches_every_pod_with_its_own_address(three: str, tmp_path: Path) -> None:
    """Across nodes and the overlay, each pod answers each other and sees the address it really has."""
    pods = {f"{p['namespace']}/{p['name']}": p["ip"] for p in status(three)["pods"]}
    pairs = [(a, b) for a in pods for b in pods if a != b]
    answers = try_out(three, tmp_path, *({"from": a, "to": b, "port": 9376} for a, b in pairs))
    assert [(x["answered_by"], x["source_seen"]) for x in answers] == [(b, pods[a]) for a, b in pairs]


def test_cluster_ip_and_node_port_reach_all_pods(three: str, tmp_path: Path) -> None:
    """All nine pods answer for the ClusterIP from a pod and a node, and for the NodePort from outside on any node."""
    found = status(three)
    ip = found["services"][0]["cluster_ips"][0]
    asked: list[dict[str, Any]] = [{"from": s, "to_ip": ip, "port": 80} for s in ("default/hostnames-1", "node:node-2")]
    asked += [{"from": "external", "to_ip": n["ip"], "port": 30080} for n in found["nodes"]]
    answers = try_out(three, tmp_path, *(one for one in asked for _ in range(150)))
    pods = {f"{p['namespace']}/{p['name']}" for p in found["pods"]}
    for i in range(len(asked)):
        assert {x["answered_by"] for x in answers[150 * i : 150 * (i + 1)]} == pods, asked[i]


def test_exec_passes_through(three: str) -> None:
    """`lab exec` runs a program with a pod's addresses or a node's files, and its exit code is the program's."""
    assert nodeplane("lab", "exec", "--name", three, "hostnames-1", "--", "sh", "-c", "exit 7", check=False).returncode == 7
    addresses = nodeplane(
        "lab", "exec", "--name", three, "default/hostnames-1", "--", "ip", "-br", "addr", "show", "eth0"
    ).stdout
    assert "10.244.1.2/32" in addresses
    env = nodeplane("lab", "exec", "node-2", "--name", three, "--", "cat", "/run/flannel/subnet.env").stdout
    assert "FLANNEL_SUBNET=10.244.2." in env
    assert "in sync" in nodeplane("lab", "exec", "--name", three, "node-1", "--", "nodeplane", "status").stdout


def test_bad_input_changes_nothing(three: str, tmp_path: Path) -> None:
    """What cannot be used is exit code 2 and one line that names object, field and value; the lab stays as it is."""
    before = (states.LABS / three / "state.json").read_bytes()
    bad = "kind: Service\nmetadata: {name: s}\nspec: {ports: [{port: 80, nodePort: 30080}], type: NodePort}\n"
    done = nodeplane("lab", "apply", "--name", three, "-f", "-", stdin=bad, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "30080/TCP is that of Service default/" in done.stderr
    file = tmp_path / "p.json"
    file.write_text('[{"from": "default/nobody", "to_ip": "10.0.0.1", "port": 1}]')
    done = nodeplane("lab", "probe", "--name", three, "--probes", str(file), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert '[0].from: must be a pod as namespace/name, node:NAME or external, is "default/nobody"' in done.stderr
    again = nodeplane("lab", "up", "--name", three, check=False)
    assert (again.returncode, f"lab {three!r} exists already" in again.stderr) == (1, True)
    assert (states.LABS / three / "state.json").read_bytes() == before


CHANGED = """
apiVersion: v1
kind: Pod
metadata: {name: talk, labels: {app: talk}}
spec:
  nodeName: node-2
  containers:
    - ports: [{name: dns, containerPort: 5353, protocol: UDP}, {containerPort: 80}]
---
apiVersion: v1
kind: Pod
metadata: {name: own}
spec:
  nodeName: node-1
  containers:
    - command: [python3, -m, http.server, "8000"]
---
apiVersion: v1
kind: Service
metadata: {name: talk}
spec:
  selector: {app: talk}
  ports: [{port: 53, targetPort: dns, protocol: UDP}]
"""


def test_apply_and_delete(name: str, tmp_path: Path) -> None:
    """Objects come and go: a UDP Service answers, a command runs, and after the deletion nobody does."""
    nodeplane("lab", "up", "--name", name, *up_options())
    nodeplane("lab", "apply", "--name", name, "-f", "-", stdin=CHANGED)
    nodeplane("lab", "wait", "--name", name)
    found = status(name)
    ip = next(s for s in found["services"] if s["name"] == "talk")["cluster_ips"][0]
    asked = {"from": "default/hostnames-1", "to_ip": ip, "port": 53, "protocol": "UDP"}
    own = {"from": "default/hostnames-3", "to": "default/own", "port": 8000, "timeout": 0.5}
    assert try_out(name, tmp_path, asked)[0]["answered_by"] == "default/talk"
    assert until(lambda: bool(try_out(name, tmp_path, own)[0]["connected"]))
    nodeplane("lab", "delete", "--name", name, "-f", "-", stdin=CHANGED)
    nodeplane("lab", "wait", "--name", name)
    assert [a["connected"] for a in try_out(name, tmp_path, {**asked, "timeout": 0.5})] == [False]
    assert len(status(name)["pods"]) == 9
    assert not [n for n in netns.names() if n.startswith(f"np-{name}-default.") and "hostnames" not in n]


def test_down_leaves_nothing_after_kill_9_of_an_agent(name: str) -> None:
    """An agent that was killed is seen as dead, is not waited for, and hinders nobody in taking the lab down."""
    before = traces()
    nodeplane("lab", "up", "--name", name, *up_options())
    victim = status(name)["nodes"][1]["agent_pid"]
    os.kill(victim, signal.SIGKILL)
    assert until(lambda: processes.start_time(victim) is None)
    node = status(name)["nodes"][1]
    assert (node["agent_pid"], node["synced"]) == (None, False)
    assert "node-2 has no running agent" in nodeplane("lab", "wait", "--name", name).stderr
    nodeplane("lab", "down", "--name", name)
    assert left_of(name) == []
    assert traces() == before
    assert nodeplane("lab", "down", "--name", name, check=False).returncode == 1


def test_down_ends_an_api_server_that_was_started_by_hand(name: str) -> None:
    """A server that somebody has started again, and that no state knows of, ends with its lab."""
    nodeplane("lab", "up", "--api", "--name", name)
    served = next(p for p in states.load(name).processes if p.what == "api server")
    os.kill(served.pid, signal.SIGKILL)
    assert until(lambda: processes.start_time(served.pid) is None)
    command = [sys.executable, "-m", "netnslab.api.server", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as again:
        try:
            assert again.stdout is not None
            assert again.stdout.readline()
            assert str(again.pid) in left_of(name)
            nodeplane("lab", "down", "--name", name)
            assert again.wait(20) == -signal.SIGKILL
        finally:
            again.kill()
    assert left_of(name) == []


@pytest.mark.parametrize("stage", ["nodes on", "agents starting", "to attach", "pods attached"])
def test_down_after_kill_9_of_up(name: str, stage: str) -> None:
    """`lab up`, killed at any stage, leaves a lab that `lab down` takes away whole."""
    before = traces()
    with subprocess.Popen(
        [sys.executable, "-m", "nodeplane", "lab", "up", "--name", name, *up_options()], stderr=subprocess.PIPE, text=True
    ) as up:
        assert up.stderr is not None
        while stage not in (line := up.stderr.readline()):
            assert line, "lab up ended early"
        up.kill()
    assert nodeplane("lab", "apply", "--name", name, "-f", "-", stdin=CHANGED, check=False).returncode == 1
    nodeplane("lab", "down", "--name", name)
    assert left_of(name) == []
    assert traces() == before


def test_an_interrupted_up_takes_down_what_it_made(name: str) -> None:
    """Ctrl-C during `lab up` leaves nothing, without another command."""
    with subprocess.Popen(
        [sys.executable, "-m", "nodeplane", "lab", "up", "--name", name, *up_options()], stderr=subprocess.PIPE, text=True
    ) as up:
        assert up.stderr is not None
        while "agents starting" not in (line := up.stderr.readline()):
            assert line, "lab up ended early"
        up.send_signal(signal.SIGINT)
        up.stderr.read()
        assert up.wait(LIMIT) == 130
    assert left_of(name) == []


def test_labs_side_by_side(name: str, three: str, tmp_path: Path) -> None:
    """A second lab with the same addresses works, and its end does not touch the first."""
    nodeplane("lab", "up", "--name", name, "--topology", "two-segments", *up_options())
    asked = [{"from": "default/hostnames-1", "to": f"default/hostnames-{i}", "port": 9376} for i in (2, 3, 4)]
    assert [a["answered_by"] for a in try_out(name, tmp_path, *asked)] == [f"default/hostnames-{i}" for i in (2, 3, 4)]
    nodeplane("lab", "down", "--name", name)
    assert left_of(name) == []
    assert [a["answered_by"] for a in try_out(three, tmp_path, *asked)] == [f"default/hostnames-{i}" for i in (2, 3, 4)]


def test_host_gw_over_two_segments_is_said_not_to_work(name: str, tmp_path: Path) -> None:
    """With host-gw the agents name the nodes behind the router that they cannot reach; those on the segment are reached."""
    up = nodeplane("lab", "up", "--name", name, "--topology", "two-segments", "--overlay", "host-gw", *up_options())
    assert "node-3" in up.stderr.partition("is up")[2]
    asked = [{"from": "default/hostnames-1", "to": f"default/hostnames-{i}", "port": 9376, "timeout": 0.5} for i in (2, 3, 4)]
    answers = try_out(name, tmp_path, *asked)
    assert [a["answered_by"] for a in answers] == ["default/hostnames-2", None, None]


@pytest.mark.parametrize(("nodes", "pods", "seconds"), [(3, 30, 15.0), (10, 100, 60.0)])
def test_labs_come_up_in_time(name: str, tmp_path: Path, nodes: int, pods: int, seconds: float) -> None:
    """Three nodes with 30 pods are in sync within 15 s, ten with 100 within 60 s, on two cores."""
    file = tmp_path / "t.toml"
    file.write_text("".join(f'[[nodes]]\nname = "n{i}"\n' for i in range(nodes)) + f'[[pods]]\nname = "p"\nreplicas = {pods}\n')
    started = time.monotonic()
    nodeplane("lab", "up", "--name", name, "--topology", str(file), *up_options())
    assert time.monotonic() - started < seconds


def test_demo() -> None:
    """The demo does all it says, says that it did, and leaves nothing."""
    before = netns.names()
    done = nodeplane("lab", "demo")
    assert "Everything was as it said" in done.stdout
    assert "\x1b" not in done.stdout
    assert not [n for n in netns.names() if n.startswith("np-demo-") and n not in before]


@pytest.mark.parametrize("script", sorted(SCENARIOS.glob("*/run.sh")), ids=lambda p: p.parent.name)
def test_scenario(script: Path) -> None:
    """Each scenario's script does what its README says, and checks it."""
    name = f"t{os.getpid()}-{secrets.token_hex(2)}"
    env = {
        **os.environ,
        "LAB": name,
        "LAB_OPTIONS": " ".join(up_options()),
        "NODEPLANE": str(Path(sys.executable).parent / "nodeplane"),
    }
    try:
        done = subprocess.run([str(script)], env=env, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        nodeplane("lab", "down", "--name", name, check=False)
    assert left_of(name) == []
