"""systemd hears what the agent does: ready, in sync, alive, reloading, stopping."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable

import pytest
from patience import Patience

from bench import cluster
from bench.running import configuration, running_agent

pytestmark = pytest.mark.kernel


def heard(sock: socket.socket, wanted: Callable[[list[str]], bool]) -> list[str]:
    """Return what is said until something is."""
    lines: list[str] = []
    limit = Patience(30)
    sock.settimeout(0.2)
    while not limit.over and not wanted(lines):
        try:
            lines += sock.recv(4096).decode().splitlines()
        except TimeoutError:
            continue
    assert wanted(lines), lines
    return lines


def test_life_of_a_service(netns, tmp_path):
    """READY once after the first sync, then WATCHDOG again and again; a reload is told, refused or not; STOPPING is the last word."""
    cluster.write_directory(tmp_path / "objects", 2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
        with running_agent(netns, tmp_path, configuration("iptables"), environment) as agent:
            said = heard(sock, lambda lines: lines.count("WATCHDOG=1") >= 2)
            assert said[:2] == ["READY=1", "STATUS=in sync: 2 Services in iptables, 6 endpoints"]
            assert said.count("READY=1") == 1

            agent.signal(signal.SIGHUP)
            said = heard(sock, lambda lines: "READY=1" in lines)
            assert said[said.index("RELOADING=1") + 1].startswith("MONOTONIC_USEC=")

            (tmp_path / "config.yaml").write_text(json.dumps({**configuration("iptables"), "kind": "Nonsense"}))
            agent.signal(signal.SIGHUP)
            heard(sock, lambda lines: "RELOADING=1" in lines and "READY=1" in lines)
            heard(sock, lambda lines: "WATCHDOG=1" in lines)
        assert heard(sock, lambda lines: "STOPPING=1" in lines)[-1] == "STOPPING=1"
