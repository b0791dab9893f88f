"""Every benchmark runs at a tiny size and hands over results in the form that scripts read; no figure is judged."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial

import pytest

from bench import (
    api_sync,
    cni_add,
    drift_repair,
    ipvs_in_vm,
    lab_up,
    overlay,
    packet_cost,
    pod_attachment,
    policy_change,
    policy_connect,
    policy_verdict,
    service_connect,
    services_change,
    services_full,
    services_sockets,
)
from bench.run import BENCHMARKS, run
from kernelstate.linux import netns

pytestmark = pytest.mark.kernel

TINY = {
    "services-change": (services_change, {"changes": 2}, 4),
    "services-full": (services_full, {"repeats": 1}, 4),
    "lab-up": (lab_up, {"sizes": ((2, 2),)}, None),
    "api-sync": (api_sync, {"changes": 1, "storm": 4, "idle": 0.1, "nodes": 5}, 4),
    "service-connect": (service_connect, {"rounds": 1, "connects": 5}, 4),
    "services-sockets": (services_sockets, {"changes": 2, "repeats": 1}, 4),
    "drift-repair": (drift_repair, {"repeats": 1}, 4),
    "packet-cost": (packet_cost, {"rounds": 1, "budget": 1.0}, 4),
    "overlay": (overlay, {"rounds": 1, "times": overlay.Times(stream=60, flood=60, ping=200)}, None),
    "pod-attachment": (pod_attachment, {"rounds": 1, "flood": 100}, None),
    "cni-add": (cni_add, {"rounds": 2, "together": 2}, None),
    "policy-verdict": (
        policy_verdict,
        {"rounds": 1, "budget": 0.5, "sizes": (1, 2), "worlds": (policy_verdict.ONE_POD,)},
        None,
    ),
    "policy-connect": (policy_connect, {"rounds": 1, "connects": 5, "number": 3}, None),
    "policy-change": (policy_change, {"changes": 1, "sizes": (20,)}, None),
    "ipvs-in-vm": (ipvs_in_vm, {"rounds": 1, "packets": 64, "native": True}, 4),  # its virtual machine takes a minute
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_runs(name, tmp_path, monkeypatch, capsys):
    """The benchmark's JSON on stdout and in its file are the same and as promised, its picture is there, its namespaces are not."""
    module, size, services = TINY[name]
    monkeypatch.setattr(module, "measure", partial(module.measure, **size))
    before = set(netns.names())
    mode = "ebpf" if name in {"service-connect", "services-sockets"} else "iptables"
    args = argparse.Namespace(name=name, services=services, mode=mode, results=tmp_path, output="json")
    assert run(args) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / f"{name}.json").read_bytes())
    assert set(result) == {"bench", "machine", "rows"}
    assert set(result["machine"]) == {"kernel", "cpu", "commit", "command"}
    assert (result["bench"], result["machine"]["command"].split()[:3]) == (name, ["nodeplane", "bench", name])
    assert result["rows"]
    for row in result["rows"]:
        assert set(row) == {"name", "mode", "params", "metric", "value", "unit", "baseline_ratio"}
        assert isinstance(row["mode"], str)
        assert isinstance(row["value"], int | float)
        assert row["value"] >= 0
        assert (row["baseline_ratio"] is None) == ("baseline" not in row["params"])
    assert f'<img src="{name}.png"' in (tmp_path / "index.html").read_text()
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not {n for n in set(netns.names()) - before if n.startswith(f"np-bench-{os.getpid()}-")}
