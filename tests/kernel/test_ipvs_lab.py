"""The lab in IPVS mode, as people use it: the same commands, the same answers."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 400


@pytest.mark.parametrize("name", ["cluster-ip-answers-ping"])
def test_scenario_in_ipvs_mode(name):
    """Every ClusterIP answers ping in IPVS mode and in no other, as the notes say."""
    env = {
        **os.environ,
        "LAB": f"i{os.getpid()}-{secrets.token_hex(2)}",
        "NODEPLANE": str(Path(sys.executable).parent / "nodeplane"),
    }
    script = ROOT / "netns-lab/scenarios" / name / "run.sh"
    done = subprocess.run([str(script)], env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ipvs: does 10.96.1.1 answer?\nping says yes" in done.stdout
