"""The lab in IPVS mode, as people use it: the same commands, the same answers."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600
SMALL = """
objects = ["{objects}"]
segments = [{{ name = "lan", subnets = ["192.168.50.0/24"] }}]
nodes = [{{ name = "node-1" }}, {{ name = "node-2" }}]
pods = [{{ name = "hostnames", replicas = 2, ports = [{{ containerPort = 9376 }}] }}]
[overlay]
backend = "vxlan"
"""
"""Two nodes are what an emulated CPU has in sync within the time that people are given."""


@pytest.mark.parametrize("name", ["cluster-ip-answers-ping"])
def test_scenario_in_ipvs_mode(name, tmp_path):
    """Every ClusterIP answers ping in IPVS mode and in no other, as the notes say."""
    topology = tmp_path / "small.toml"
    topology.write_text(SMALL.format(objects=ROOT / "netns-lab/topologies/hostnames.yaml"))
    env = {
        **os.environ,
        "LAB": f"i{os.getpid()}-{secrets.token_hex(2)}",
        "LAB_OPTIONS": f"--topology {topology}",
        "NODEPLANE": str(Path(sys.executable).parent / "nodeplane"),
    }
    script = ROOT / "netns-lab/scenarios" / name / "run.sh"
    done = subprocess.run([str(script)], env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ipvs: does 10.96.1.1 answer?\nping says yes" in done.stdout
