"""The gate between the CNI plugin and the agent: who waits, who is let through, and what is remembered."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from immutables import Map
from patience import Patience

from clusterstate.objects import Pod
from clusterstate.snapshot import Snapshot, Update
from nodeplane.cni import gate as plugin
from nodeplane.cni.protocol import Attachment, CniError
from nodeplane.pod_gate import PodGate, _Told, remove

WEB = ("a", "web")


def attachment(namespace: str = "a", name: str = "web", container: str = "c1") -> Attachment:
    return Attachment(container, "/proc/self/ns/net", "eth0", {"K8S_POD_NAMESPACE": namespace, "K8S_POD_NAME": name})


def cluster(*ips: str, node: str = "n1", phase: str = "Running") -> Update:
    """Return a cluster with the pod a/web at these addresses."""
    pod = Pod("a", "web", node, tuple(map(ip_address, ips)), phase=phase)
    return Update(Snapshot(pods=Map({WEB: pod})), frozenset())


class Asking:
    """A plugin that waits, in a thread."""

    def __init__(self, path: Path, *addresses: str, seconds: int = 5) -> None:
        self.error: CniError | None = None
        conf = {"policySocket": str(path), "policyWaitSeconds": seconds}
        self.thread = threading.Thread(target=self._ask, args=(conf, addresses), daemon=True)
        self.thread.start()

    def _ask(self, conf: dict, addresses: tuple[str, ...]) -> None:
        try:
            plugin.wait(conf, attachment(), addresses)
        except CniError as error:
            self.error = error

    def done(self) -> bool:
        self.thread.join(5)
        return not self.thread.is_alive() and self.error is None


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[PodGate]:
    one = PodGate("n1", tmp_path / "policy.sock", tmp_path / "told.json")
    one.open()
    yield one
    one.close()


def asked(gate: PodGate) -> None:
    """Wait until a question has come in, and take it in."""
    limit = Patience(5)
    while not gate.take():
        assert not limit.over
        time.sleep(0.005)


def test_a_pod_waits_until_its_policies_are_in_force(gate, tmp_path):
    """The pod has the addresses that were told, and is let through when that state is in the kernel, not before."""
    asking = Asking(tmp_path / "policy.sock", "10.244.1.9", "fd00::9")
    asked(gate)
    gate.settle(cluster().snapshot)
    assert asking.thread.is_alive(), "the Pod has no addresses in what the kernel holds"
    amended = gate.amend(cluster())
    assert amended.snapshot.pods[WEB].ips == (ip_address("10.244.1.9"), ip_address("fd00::9"))
    assert amended.changed == {amended.snapshot.pods[WEB].ref}
    assert gate.amend(amended).snapshot.pods[WEB].ips == amended.snapshot.pods[WEB].ips, "the same again is no news"
    gate.settle(amended.snapshot)
    assert asking.done()


def test_what_the_pod_says_itself_counts(gate, tmp_path):
    """Told addresses replace those of an earlier life of the pod, until it says the same; then they are forgotten."""
    asking = Asking(tmp_path / "policy.sock", "10.244.1.9")
    asked(gate)
    assert gate.amend(cluster("10.244.1.5")).snapshot.pods[WEB].ips == (ip_address("10.244.1.9"),)
    said = gate.amend(cluster("10.244.1.9"))
    gate.settle(said.snapshot)
    assert asking.done()
    assert gate.amend(cluster("10.244.1.7")).snapshot.pods[WEB].ips == (ip_address("10.244.1.7"),)
    assert PodGate("n1", tmp_path / "x", tmp_path / "told.json")._told == {}


def test_an_address_given_anew_is_the_new_pods(gate, tmp_path):
    """When an address is given to another pod, the one that was told it before and never said it has lost it."""
    gate._told["a", "gone"] = _Told("c0", (ip_address("10.244.1.9"),))
    asking = Asking(tmp_path / "policy.sock", "10.244.1.9")
    asked(gate)
    assert gate._told == {WEB: _Told("c1", (ip_address("10.244.1.9"),))}
    gate.settle(gate.amend(cluster()).snapshot)
    assert asking.done()


@pytest.mark.parametrize(
    ("update", "why"),
    [
        (Update(Snapshot(), frozenset()), "the agent has not heard of the pod yet"),
        (cluster("10.244.1.9", node="n2"), "the pod is one of node n2, this is n1"),
        (cluster("10.244.1.7", phase="Failed"), "the pod has other addresses by now, or its phase is one of the last"),
    ],
    ids=["unknown", "elsewhere", "failed"],
)
def test_pods_that_are_not_here_are_waited_for(gate, tmp_path, update, why):
    """A pod nobody has heard of, of another node, or at its end is not let through; when its time is over the plugin says why."""
    asking = Asking(tmp_path / "policy.sock", "10.244.1.9", seconds=1)
    asked(gate)
    gate.settle(gate.amend(update).snapshot)
    asking.thread.join(5)
    assert asking.error is not None
    assert asking.error.code == 11
    assert asking.error.message == f"NetworkPolicies of pod a/web are not in force after 1 s: {why}"


def test_what_the_kernel_refuses_is_the_reason(gate, tmp_path):
    """Where policies cannot be written, the plugin's error is the kernel's; an agent that says nothing is another one."""
    asking = Asking(tmp_path / "policy.sock", "10.244.1.9", seconds=1)
    asked(gate)
    gate.settle(gate.amend(Update(Snapshot(), frozenset())).snapshot)
    gate.amend(cluster())
    gate.fail("nft: table nodeplane-policy:\nNo space left on device")
    asking.thread.join(5)
    assert "cannot write them: nft: table nodeplane-policy: No space left on device" in asking.error.message
    silent = Asking(tmp_path / "policy.sock", "10.244.1.9", seconds=1)
    silent.thread.join(5)
    assert "the agent has said nothing" in silent.error.message


def test_a_container_that_has_gone_takes_its_addresses_along(gate, tmp_path):
    """What was told of a container ends with it; the pod's next container is none of that business."""
    conf = {"policySocket": str(tmp_path / "policy.sock")}
    asking = Asking(tmp_path / "policy.sock", "10.244.1.9")
    asked(gate)
    gate.settle(gate.amend(cluster()).snapshot)
    assert asking.done()
    plugin.withdraw(conf, attachment(container="c0"))
    asked(gate)
    assert gate.amend(cluster()).snapshot.pods[WEB].ips == (ip_address("10.244.1.9"),)
    plugin.withdraw(conf, attachment(name=""))
    asked(gate)
    after = gate.amend(cluster())
    assert (after.snapshot.pods[WEB].ips, after.changed) == ((), {after.snapshot.pods[WEB].ref})
    assert gate.told() == 0
    assert PodGate("n1", tmp_path / "x", tmp_path / "told.json").told() == 0


def test_an_agent_that_starts_anew_remembers(gate, tmp_path):
    """The next agent knows what was told, answers on the same path, and the plugin that waits asks it."""
    asking = Asking(tmp_path / "policy.sock", "10.244.1.9")
    asked(gate)
    gate.amend(cluster())
    gate.close()
    after = PodGate("n1", tmp_path / "policy.sock", tmp_path / "told.json")
    after.open()
    try:
        assert after.amend(cluster()).snapshot.pods[WEB].ips == (ip_address("10.244.1.9"),)
        asked(after)
        after.settle(after.amend(cluster()).snapshot)
        assert asking.done()
    finally:
        after.close()


def test_nobody_waits_where_nobody_enforces(tmp_path):
    """Without a socket, and for what is no pod of Kubernetes, there is nothing to wait for; behind a dead agent there is."""
    path = tmp_path / "policy.sock"
    plugin.wait({"policySocket": str(path)}, attachment(), ["10.244.1.9"])
    gate = PodGate("n1", path, tmp_path / "told.json")
    gate.open()
    plugin.wait({"policySocket": str(path)}, attachment(name=""), ["10.244.1.9"])
    gate.close()
    with pytest.raises(CniError, match=r"no agent answers at .*policy.sock: Connection refused"):
        plugin.wait({"policySocket": str(path), "policyWaitSeconds": 1}, attachment(), ["10.244.1.9"])
    remove(path, tmp_path / "told.json")
    plugin.wait({"policySocket": str(path)}, attachment(), ["10.244.1.9"])


@pytest.mark.parametrize(
    "question",
    [
        b"hello\n",
        b'{"namespace": "a"}\n',
        b'{"addresses": ["10.244.1.9"]}\n',
        b'{"namespace":"a","name":"b","addresses":["x"]}\n',
        b"x" * 5000,
    ],
)
def test_who_asks_something_else_is_cut_off(gate, tmp_path, question, caplog):
    """Rubbish on the socket ends its connection, is named in the log, and hinders nobody."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(5)
        client.connect(str(tmp_path / "policy.sock"))
        client.sendall(question)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(10) == b""
    assert "a question that is none" in caplog.text
    assert not gate.take()
