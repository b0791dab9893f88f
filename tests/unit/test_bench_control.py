"""What benchmarks measure: the made-up cluster, the stages, and the agent whose every step is measured."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench import cluster, services_change, services_full
from bench.control import MeasuredAgent
from bench.fresh import in_fresh_process, memory
from bench.result import Options
from bench.stages import STAGES, Stages
from clusterstate.sources.files import FileSource, load_objects
from nodeplane.commands import Failed


@pytest.fixture
def agent(tmp_path):
    """Make an agent over five Services, one object a file; yields it and their directory."""
    cluster.write_directory(tmp_path / "objects", 5)
    stages = Stages("iptables")
    with stages.watching():
        measured = MeasuredAgent(tmp_path / "objects", "iptables", stages)
        yield measured, tmp_path / "objects"
        measured.close()


def test_list_and_directory_hold_the_same_cluster(tmp_path):
    """Both ways of writing the cluster are read without complaint and say the same."""
    cluster.write_list(tmp_path / "all.json", 7)
    cluster.write_directory(tmp_path / "one-by-one", 7)
    whole, complaints = load_objects([tmp_path / "all.json"])
    apart, others = load_objects([tmp_path / "one-by-one"])
    assert (complaints, others) == ((), ())
    assert whole == apart
    assert (len(whole.services), len(whole.slices), len(whole.nodes)) == (7, 7, cluster.NODES)


def test_first_sync_writes_the_whole_cluster(agent):
    """The first text has a chain for each Service and each endpoint, and its stages add up to its work."""
    measured, _ = agent
    work = measured.first()
    assert work.text.count("\n:KUBE-SVC-") == 5
    assert work.text.count("\n:KUBE-SEP-") == 5 * cluster.ENDPOINTS
    assert tuple(work.stages) == STAGES
    assert sum(work.stages.values()) == pytest.approx(work.cpu, rel=0.01)
    assert all(work.stages[stage] > 0 for stage in ("read", "compile", "render", "plan", "print"))


def test_a_change_writes_the_change_alone(agent):
    """An added endpoint comes to the text of its own chain and of its Service's."""
    measured, path = agent
    measured.first()
    cluster.put(path, cluster.endpoint_slice(3, cluster.ENDPOINTS + 1))
    chains = [line.split()[0] for line in measured.follow().text.splitlines() if line.startswith(":")]
    assert sorted(chain[:10] for chain in chains) == [":KUBE-SEP-", ":KUBE-SVC-"]


def test_stages_leave_no_trace():
    """The stages' functions are what they were once nobody watches, also after a failure."""
    before = FileSource.poll
    with ExitStack() as stack:
        stack.enter_context(Stages("iptables").watching())
        assert FileSource.poll is not before
        stack.callback(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stack.close()
    assert FileSource.poll is before


def test_fresh_process_reports_failure():
    """What goes wrong in the measuring process is this one's failure, in its words."""
    with pytest.raises(Failed, match="no such file or directory"):
        in_fresh_process(
            "bench.services_full:measure_here", {"path": "/nowhere.json", "text_path": "", "mode": "iptables"}, dict
        )


def test_memory_in_megabytes(tmp_path):
    """Sizes are read from the kernel's kB (1024 bytes) into MB (10^6 bytes)."""
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t    2000 kB\n")
    assert memory("VmHWM", tmp_path / "status") == 2.048
    with pytest.raises(LookupError, match="has no VmRSS"):
        memory("VmRSS", tmp_path / "status")


@pytest.mark.parametrize(("stated", "sizes"), [(None, [100, 1000, 10000]), (10000, [100, 10000]), (100, [100]), (7, [7])])
def test_a_stated_size_is_compared_with_a_small_one(stated, sizes):
    """services-change measures a stated size and, as its baseline, the smallest one."""
    assert services_change.sizes(stated) == sizes


def test_without_root_the_agent_is_measured_alone(monkeypatch, capsys):
    """Without root the kernel's part is left out, which stderr says, and the agent's part is there."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    rows = services_full.measure(Options(services=3), repeats=1)
    metrics = {row.metric for row in rows}
    assert {"work", "peak RSS", "text lines"} <= metrics
    assert not [metric for metric in metrics if metric.startswith("kernel")]
    assert capsys.readouterr().err == "services-full: the kernel's part is left out, it needs root\n"


def test_cluster_files_have_distinct_names():
    """No two objects share a file."""
    made = list(cluster.objects(20))
    assert len({cluster.file_of(Path("/x"), one) for one in made}) == len(made)
