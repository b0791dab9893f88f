"""Golden scenarios: a cluster goes in, native text comes out; the diff of a golden file is the review.

Each folder holds ``cluster.yaml``, sometimes ``config.yaml``, and what ``nodeplane render`` prints for node n1:
``iptables.txt``, ``ipvs.txt`` and ``nftables.txt``, one a mode (both families where there are two), and, with an overlay in the
configuration, ``overlay.txt``; where it enforces policies, ``policy.txt`` and ``policy-iptables.txt``. ``make golden`` writes them again.
"""

import os
from pathlib import Path

import pytest

from nodeplane.__main__ import main

HERE = Path(__file__).parent
SCENARIOS = sorted(p.parent.name for p in HERE.glob("*/cluster.yaml"))
MODES = ("iptables", "ipvs", "nftables")
WRITE = os.environ.get("GOLDEN") == "write"


def expected_files(folder):
    """Return what a scenario must hold."""
    config = folder / "config.yaml"
    text = config.read_text() if config.exists() else ""
    if "policy:" in text:
        return ["policy.txt", "policy-iptables.txt"]
    return [f"{mode}.txt" for mode in MODES] + (["overlay.txt"] if "overlay:" in text else [])


CASES = [(s, f) for s in SCENARIOS for f in expected_files(HERE / s)]


@pytest.mark.parametrize(("scenario", "name"), CASES, ids=[f"{s}-{f}" for s, f in CASES])
def test_golden(scenario, name, capsys, tmp_path):
    """Rendering the scenario gives exactly the golden text."""
    folder = HERE / scenario
    what, _, policy_mode = name.removesuffix(".txt").partition("-")
    asked = ["--mode", what] if what in MODES else ["--part", what]
    arguments = ["render", "--objects", str(folder / "cluster.yaml"), "--node", "n1", *asked]
    config = folder / "config.yaml"
    if policy_mode:
        text = config.read_text()
        assert "mode: nftables" in text
        config = tmp_path / "config.yaml"
        config.write_text(text.replace("mode: nftables", f"mode: {policy_mode}"))
    if config.exists():
        arguments += ["--config", str(config)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    if WRITE:
        (folder / name).write_text(printed)
    assert printed == (folder / name).read_text()


def test_every_golden_file_is_checked():
    """No golden file lies around that nothing compares."""
    found = {(p.parent.name, p.name) for p in HERE.glob("*/*.txt")}
    assert found == set(CASES)
