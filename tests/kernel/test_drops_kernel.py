"""``nodeplane drops`` sees what this kernel drops, and says why and of which flow it was."""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from patience import Patience

from kernelstate.linux import netns as namespaces

pytestmark = pytest.mark.kernel

RULES = """table inet t {
  chain input {
    type filter hook input priority 0
    udp dport 999 drop
  }
}
"""
PODS = """
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
spec: {nodeName: n1, containers: [{name: c, image: i}]}
status: {phase: Running, podIPs: [{ip: 10.9.9.9}]}
"""


@contextmanager
def tracing(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command while the body runs."""
    command = [sys.executable, "-m", "nodeplane", "drops", "--every", "0.1", "--for", "60", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def send(name: str, *, destination: str = "127.0.0.1", family: int = socket.AF_INET) -> None:
    with namespaces.inside(name), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", (destination, 999))


def first_line(process: subprocess.Popen[str], name: str, **options: object) -> str:
    """Send packets until the command says something of one."""
    assert process.stdout is not None
    limit = Patience(30)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not limit.over:
            send(name, **options)  # type: ignore[arg-type]
            if selector.select(0.2):
                return process.stdout.readline()
    raise AssertionError("nothing was said of any packet")


@pytest.mark.parametrize(("destination", "family"), [("10.9.9.9", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_reason_place_and_flow(in_netns, tmp_path, destination, family):
    """A packet that a rule drops is told with reason, namespace, link, addresses, ports, and the pod's name."""
    namespaces.run(in_netns, ["ip", "addr", "add", "10.9.9.9/32", "dev", "lo"])
    namespaces.run(in_netns, ["nft", "-f", "-"], stdin=RULES)
    (tmp_path / "pods.yaml").write_text(PODS)
    with tracing("--netns", in_netns, "-o", "json", "--objects", str(tmp_path)) as process:
        shown = json.loads(first_line(process, in_netns, destination=destination, family=family))
    drop = shown["drop"]
    assert (shown["netns"], drop["reason"], drop["dev"], drop["protocol"]) == (in_netns, "NETFILTER_DROP", "lo", "UDP")
    assert (drop["destination"], drop["destination_port"]) == (destination, 999)
    assert drop["source_port"] > 0
    assert shown["destination_name"] == ("shop/web" if destination == "10.9.9.9" else "")


def test_other_namespaces_and_reasons_are_left_out(in_netns):
    """With a reason asked for, packets that are dropped for another one are not told; the end has a sum and a hint."""
    with tracing("--netns", in_netns, "--reason", "NO_SOCKET", "--latency") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("time")
        namespaces.run(in_netns, ["nft", "-f", "-"], stdin=RULES)
        send(in_netns)  # dropped by the rule
        namespaces.run(in_netns, ["nft", "delete", "table", "inet", "t"])
        line = first_line(process, in_netns)
        process.terminate()
        rest = process.communicate(timeout=120)[0]
    assert "NO_SOCKET" in line
    assert "NETFILTER_DROP" not in line + rest
    assert "nobody listens there" in rest
    assert "from a link's queue to being received: " in rest
