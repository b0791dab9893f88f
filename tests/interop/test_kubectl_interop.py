"""The real kubectl against a lab: the examples are applied as they are, pods start, and packets follow."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from patience import eventually

from kernelstate.linux import netns
from netnslab import processes
from netnslab import state as states
from netnslab.api import remote
from netnslab.topology import BUNDLED

pytestmark = pytest.mark.kernel

KUBECTL = Path(sys.executable).parent / "kubectl"
EXAMPLES = BUNDLED.parent / "examples"
LIMIT = 60.0


class Lab:
    """A lab with an API server, and kubectl for it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *arguments: str) -> str:
        """Run a `nodeplane lab` command on it."""
        command = [sys.executable, "-m", "nodeplane", "lab", arguments[0], "--name", self.name, *arguments[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def kubectl(self, *arguments: str, code: int = 0, said: str = "") -> str:
        """Run kubectl; return what it says, on both channels."""
        done = subprocess.run(
            [str(KUBECTL), *arguments], env=self.env, input=said, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def env(self) -> dict[str, str]:
        """The environment kubectl runs in."""
        return {**os.environ, "KUBECONFIG": str(self.state.kubeconfig), "KUBECACHEDIR": str(self.state.root / "cache")}

    @property
    def state(self) -> states.LabState:
        return states.load(self.name)

    def get(self, *arguments: str):
        """Return objects as kubectl prints them in JSON."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def ask(self, place: str, url: str, times: int = 1) -> set[str]:
        """Ask an address from a pod, a node or outside; return who answered; an empty word for nobody."""
        script = f'for i in $(seq {times}); do curl -s -m 2 "{url}" || echo; done'
        return {line.partition(" ")[0] for line in self.run("exec", place, "--", "sh", "-c", script).splitlines()}


class Knocks:
    """Connections one after another: how many, and what became of those that were not answered."""

    def __init__(self) -> None:
        self.count, self.failed, self.over = 0, list[str](), threading.Event()

    def go_on(self, space: str, address: str, port: int) -> None:
        netns.enter(space)
        until = time.monotonic() + 2 * LIMIT
        while not self.over.is_set() and time.monotonic() < until:
            self.count += 1
            try:
                with socket.create_connection((address, port), timeout=3) as client:
                    client.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    if not client.recv(100):
                        self.failed.append("closed without an answer")
            except OSError as error:
                self.failed.append(str(error))


@contextmanager
def knocking(space: str, address: str, port: int) -> Iterator[Knocks]:
    """Connect from a namespace again and again, until the block ends."""
    found = Knocks()
    thread = threading.Thread(target=found.go_on, args=(space, address, port))
    thread.start()
    try:
        yield found
    finally:
        found.over.set()
        thread.join(LIMIT)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Three nodes with policies, and nothing else."""
    name = f"t{os.getpid()}-{secrets.token_hex(2)}"
    try:
        subprocess.run(
            [sys.executable, "-m", "nodeplane", "lab", "up", "--api", "--policy", "nftables", "--name", name],
            check=True,
            capture_output=True,
            timeout=2 * LIMIT,
        )
        yield Lab(name)
    finally:
        subprocess.run(
            [sys.executable, "-m", "nodeplane", "lab", "down", "--name", name], check=False, capture_output=True, timeout=LIMIT
        )


def test_get(lab: Lab) -> None:
    """`kubectl get` shows nodes, pods, Services and endpoints in the columns people know."""
    nodes = lab.kubectl("get", "nodes", "-o", "wide").splitlines()
    assert nodes[0].split()[:6] == ["NAME", "STATUS", "ROLES", "AGE", "VERSION", "INTERNAL-IP"]
    assert [line.split()[:2] for line in nodes[1:]] == [[f"node-{i}", "Ready"] for i in (1, 2, 3)]
    pods = [line.split() for line in lab.kubectl("get", "pods", "-o", "wide").splitlines()]
    assert pods[1][:4] + pods[1][5:7] == ["hostnames-1", "1/1", "Running", "0", "10.244.1.2", "node-1"]
    assert "80:30080/TCP" in lab.kubectl("get", "svc", "hostnames")
    assert "10.244.1.2:9376,10.244.2.2:9376,10.244.3.2:9376 + 6 more..." in lab.kubectl("get", "endpoints", "hostnames")


def test_the_examples(lab: Lab) -> None:
    """Applied unchanged, a Deployment with its Service, one with a NodePort and an external IP, are reached as they should be."""
    lab.kubectl("apply", "-f", str(EXAMPLES / "hostnames.yaml"))
    lab.kubectl("rollout", "status", "deployment/hostnames", "-n", "example", "--timeout=30s")
    lab.run("wait")
    pods = {f"example/{pod['metadata']['name']}" for pod in lab.get("pods", "-n", "example", "-l", "app=hostnames")["items"]}
    assert len(pods) == 3
    address = lab.get("svc", "-n", "example", "hostnames")["spec"]["clusterIP"]
    assert lab.ask("hostnames-1", f"http://{address}", 40) == pods
    lab.kubectl("apply", "-f", str(EXAMPLES / "my-nginx.yaml"))
    lab.run("wait")
    port = lab.get("svc", "-n", "example", "my-nginx")["spec"]["ports"][0]["nodePort"]
    nginx = {f"example/{pod['metadata']['name']}" for pod in lab.get("pods", "-n", "example", "-l", "run=my-nginx")["items"]}
    assert lab.ask("external", f"http://192.168.50.12:{port}", 30) == nginx
    assert lab.ask("node-1", "http://80.11.12.10:9090", 30) == nginx
    assert "unchanged" in lab.kubectl("apply", "-f", str(EXAMPLES / "hostnames.yaml"))
    lab.kubectl("delete", "-f", str(EXAMPLES / "my-nginx.yaml"))
    lab.run("wait")
    assert lab.ask("external", f"http://192.168.50.12:{port}") == {""}


def test_the_example_of_a_policy(lab: Lab) -> None:
    """The documentation's NetworkPolicy lets in whom it names, on its port, and nobody else."""
    lab.kubectl("apply", "-f", str(EXAMPLES / "network-policy.yaml"))
    lab.kubectl("wait", "--for=condition=Ready", "pod", "--all", "-n", "policy", "--timeout=30s")
    lab.run("wait")
    db = lab.get("pod", "db", "-n", "policy")["status"]["podIP"]
    asked = {place: lab.ask(place, f"http://{db}:6379") for place in ("policy/frontend", "policy/other", "myproject/client")}
    assert asked == {"policy/frontend": {"policy/db"}, "policy/other": {""}, "myproject/client": {"policy/db"}}
    lab.kubectl("label", "pod", "other", "-n", "policy", "role=frontend")
    lab.run("wait")
    assert lab.ask("policy/other", f"http://{db}:6379") == {"policy/db"}
    lab.kubectl("delete", "namespace", "policy", "myproject", "--timeout=30s")
    assert not [name for name in netns.names() if name.startswith(f"np-{lab.name}-policy.")]


def test_every_day(lab: Lab) -> None:
    """run, expose, wait, label, patch, scale, cordon, create, edit of an image, undo and delete do what they do elsewhere."""
    lab.kubectl("create", "namespace", "day")
    try:
        lab.kubectl("run", "probe", "-n", "day", "--image=x", "--port=80")
        lab.kubectl("expose", "pod", "probe", "-n", "day", "--port=80")
        lab.kubectl("wait", "--for=condition=Ready", "pod/probe", "-n", "day", "--timeout=30s")
        lab.kubectl("patch", "svc", "probe", "-n", "day", "-p", '{"spec":{"type":"NodePort"}}')
        assert lab.get("svc", "probe", "-n", "day")["spec"]["ports"][0]["nodePort"] >= 30000
        lab.kubectl("create", "deployment", "web", "-n", "day", "--image=a", "--replicas=2", "--port=80")
        lab.kubectl("create", "service", "clusterip", "web", "-n", "day", "--tcp=80:80")
        lab.kubectl("cordon", "node-1")
        lab.kubectl("scale", "deployment/web", "-n", "day", "--replicas=5")
        lab.kubectl("rollout", "status", "deployment/web", "-n", "day", "--timeout=30s")
        lab.kubectl("uncordon", "node-1")
        pods = lab.get("pods", "-n", "day", "-l", "app=web")["items"]
        assert len(pods) == 5
        young = sorted(pods, key=lambda pod: int(pod["metadata"]["resourceVersion"]))[-3:]
        assert {pod["spec"]["nodeName"] for pod in young} <= {"node-2", "node-3"}
        lab.kubectl("set", "image", "deployment/web", "*=b", "-n", "day")
        lab.kubectl("rollout", "undo", "deployment/web", "-n", "day")
        lab.kubectl("rollout", "status", "deployment/web", "-n", "day", "--timeout=30s")
        images = {pod["spec"]["containers"][0]["image"] for pod in lab.get("pods", "-n", "day", "-l", "app=web")["items"]}
        assert "a" in images
        assert "Successfully assigned day/probe to" in lab.kubectl("describe", "pod", "probe", "-n", "day")
        assert "nodeplane runs" in lab.kubectl("describe", "node", "node-2")
        lab.kubectl("delete", "pod", "probe", "-n", "day", "--timeout=30s")
        assert 'pods "probe" not found' in lab.kubectl("get", "pod", "probe", "-n", "day", code=1)
    finally:
        lab.kubectl("delete", "namespace", "day", "--timeout=30s")
    assert "day" not in lab.kubectl("get", "namespaces")


def test_watch(lab: Lab) -> None:
    """`kubectl get -w` shows a pod pending, running, ending and gone, as it happens."""
    watch = subprocess.Popen(
        [
            str(KUBECTL),
            "get",
            "pods",
            "-l",
            "app=seen",
            "-w",
            "-o",
            "jsonpath={.status.phase} {.metadata.deletionTimestamp}{'\\n'}",
        ],
        env=lab.env,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert watch.stdout is not None
        lab.kubectl("run", "seen", "--image=x", "--labels=app=seen")
        lines = [watch.stdout.readline().strip()]
        while lines[-1] != "Running":
            lines.append(watch.stdout.readline().strip())
        lab.kubectl("delete", "pod", "seen", "--timeout=30s")
        assert watch.stdout.readline().startswith("Running 20")
    finally:
        watch.kill()
        watch.communicate(timeout=LIMIT)
    assert lines[0] in {"Pending", "Running"}


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (
            "{apiVersion: v1, kind: Service, metadata: {name: b}, spec: {selectr: {a: b}, ports: [{port: 80}]}}",
            'unknown field "spec.selectr"',
        ),
        (
            "{apiVersion: v1, kind: Service, metadata: {name: b}, spec: {ports: [{port: 99999}]}}",
            "spec.ports[0].port: must be between",
        ),
        (
            "{apiVersion: v1, kind: Service, metadata: {name: b}, spec: {clusterIP: 10.96.1.1, ports: [{port: 80}]}}",
            "10.96.1.1 is that of Service default/hostnames already",
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: nowhere}, spec: {containers: [{name: a}]}}",
            'namespaces "nowhere" not found',
        ),
        ("{apiVersion: v1, kind: ConfigMap, metadata: {name: b}}", "ConfigMap"),
    ],
)
def test_what_is_wrong_is_said(lab: Lab, manifest: str, words: str) -> None:
    """The client prints which field of which object cannot be, and nothing comes of it."""
    assert words in lab.kubectl("apply", "-f", "-", code=1, said=manifest)
    assert "NotFound" in lab.kubectl("get", "svc", "b", code=1)


def test_a_pod_that_fits_nowhere_waits(lab: Lab) -> None:
    """A pod for which there is no node is taken, says why it waits, starts as soon as there is one, and hinders nobody."""
    spec = {"nodeSelector": {"disk": "ssd"}, "containers": [{"name": "c", "image": "x"}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "picky"}, "spec": spec}
    lab.kubectl("apply", "-f", "-", said=yaml.safe_dump(pod))
    eventually(lambda: "no node has these labels: {'disk': 'ssd'}" in lab.kubectl("describe", "pod", "picky"), LIMIT)
    assert lab.get("pod", "picky")["status"]["phase"] == "Pending"
    lab.kubectl("label", "node", "node-3", "disk=ssd")
    lab.kubectl("wait", "--for=condition=Ready", "pod/picky", "--timeout=30s")
    assert lab.get("pod", "picky")["spec"]["nodeName"] == "node-3"
    lab.kubectl("delete", "pod", "picky", "--timeout=30s")


def test_nobody_without_the_token(lab: Lab, tmp_path: Path) -> None:
    """Without a token there is no answer; with an agent's there is no writing but what an agent writes."""
    config = yaml.safe_load(Path(lab.env["KUBECONFIG"]).read_text())
    server = config["clusters"][0]["cluster"]["server"]
    node = yaml.safe_load((lab.state.node_dir("node-1") / "run/kubeconfig").read_text())
    path = tmp_path / "kubeconfig"
    for users, words in (([], "Unauthorized"), (node["users"], 'User "agent" cannot create resource "namespaces"')):
        stated = {**config, "users": users or [{"name": "admin", "user": {"token": "guess"}}]}
        stated["contexts"][0]["context"]["user"] = stated["users"][0]["name"]
        path.write_text(yaml.safe_dump(stated))
        said = lab.kubectl("--kubeconfig", str(path), "--server", server, "create", "namespace", "mine", code=1)
        assert words in said or "logged in" in said
    assert Path(lab.env["KUBECONFIG"]).stat().st_mode & 0o077 == 0


def test_pods_reach_the_server(lab: Lab) -> None:
    """The Service default/kubernetes leads every pod to the API server, whose certificate is for that name."""
    authority = lab.state.root / "api/ca.crt"
    ask = [
        "curl",
        "-s",
        "-m",
        "5",
        "--cacert",
        str(authority),
        "--resolve",
        "kubernetes.default:443:10.96.0.1",
        "https://kubernetes.default/healthz",
    ]
    assert lab.run("exec", "hostnames-1", "--", *ask) == "ok"


def test_no_connection_is_lost_in_a_rolling_update(lab: Lab) -> None:
    """While a Deployment changes its pods one by one, every new connection through the Service is answered."""
    lab.kubectl("apply", "-f", str(EXAMPLES / "hostnames.yaml"))
    lab.kubectl("rollout", "status", "deployment/hostnames", "-n", "example", "--timeout=30s")
    lab.run("wait")
    address = lab.get("svc", "-n", "example", "hostnames")["spec"]["clusterIP"]
    client = lab.state.pod("default/hostnames-2")
    assert client is not None
    with knocking(client.netns, address, 80) as knocks:
        lab.kubectl("rollout", "restart", "deployment/hostnames", "-n", "example")
        lab.kubectl("rollout", "status", "deployment/hostnames", "-n", "example", "--timeout=50s")
        lab.run("wait")
    assert knocks.failed == []
    assert knocks.count > 100


def test_the_server_killed_and_started_again(lab: Lab) -> None:
    """Killed with -9 the server is missed by nobody who forwards; started again it has all objects, and agents go on."""
    lab.run("wait")
    before = {pod["metadata"]["uid"] for pod in lab.get("pods", "-A")["items"]}
    state = lab.state
    victim = next(p for p in state.processes if p.what == remote.LABEL)
    os.kill(victim.pid, signal.SIGKILL)
    eventually(lambda: not processes.is_alive(victim), LIMIT)
    assert lab.ask("hostnames-1", "http://10.96.1.1") != {""}
    assert "refused" in lab.kubectl("get", "pods", code=1)
    with states.locked(lab.name):
        remote.run(states.load(lab.name))
    assert {pod["metadata"]["uid"] for pod in lab.get("pods", "-A")["items"]} == before
    lab.kubectl("create", "service", "clusterip", "after", "--tcp=80:9376")
    lab.kubectl("set", "selector", "svc", "after", "app=hostnames")
    lab.run("wait")
    address = lab.get("svc", "after")["spec"]["clusterIP"]
    assert lab.ask("hostnames-1", f"http://{address}") != {""}
    lab.kubectl("delete", "svc", "after")
