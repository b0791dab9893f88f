"""Results of benchmarks: their form, their ratios, their table, and that the command line refuses what it cannot do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import bench
from bench.machine import commit, cpu_name
from bench.plots import draw
from bench.result import Machine, Result, Row, against, median, number, p95, result_table, value_of, write_result
from bench.run import BENCHMARKS, run
from nodeplane.commands import Usage

MACHINE = Machine(kernel="6.1.0", cpu="2 x Some CPU", commit="0123456789ab", command="nodeplane bench drift-repair")
ROW = Row("first sync", "iptables", {"services": 100}, "work", 30.0, "ms")
DRIFT = [
    Row("first sync", "iptables", {"services": 5}, "text size", 8000.0, "bytes"),
    Row("nat flushed", "iptables", {"services": 5}, "until back median", 1100.0, "ms"),
    Row("nat flushed", "iptables", {"services": 5}, "until back longest", 1200.0, "ms"),
    Row("nat flushed", "iptables", {"services": 5}, "text size", 7000.0, "bytes"),
]


def arguments(**stated):
    return argparse.Namespace(**{"name": None, "services": None, "mode": None, "output": "text"} | stated)


def test_result_has_the_form_that_scripts_read(tmp_path):
    """A result's file holds bench, machine and rows with exactly the fields that are promised."""
    path = write_result(Result("drift-repair", MACHINE, [against(ROW, 20.0, "kernel apply")]), tmp_path / "made")
    assert path == tmp_path / "made" / "drift-repair.json"
    assert json.loads(path.read_bytes()) == {
        "bench": "drift-repair",
        "machine": {
            "kernel": "6.1.0",
            "cpu": "2 x Some CPU",
            "commit": "0123456789ab",
            "command": "nodeplane bench drift-repair",
        },
        "rows": [
            {
                "name": "first sync",
                "mode": "iptables",
                "params": {"services": 100, "baseline": "kernel apply"},
                "metric": "work",
                "value": 30.0,
                "unit": "ms",
                "baseline_ratio": 1.5,
            }
        ],
    }


def test_a_row_without_a_baseline_has_none():
    """Nothing to compare with, or a baseline of zero, leaves the ratio null."""
    assert ROW.baseline_ratio is None
    assert against(ROW, 0.0, "nothing") == ROW


@pytest.mark.parametrize(
    ("values", "middle", "high"),
    [([3.0], 3.0, 3.0), ([4.0, 1.0], 2.5, 4.0), ([3.0, 1.0, 2.0], 2.0, 3.0), ([float(i) for i in range(1, 101)], 50.5, 95.0)],
)
def test_median_and_p95(values, middle, high):
    """The median is the middle, p95 the smallest value that 95 of 100 do not exceed."""
    assert (median(values), p95(values)) == (middle, high)


def test_value_of_finds_by_name_metric_and_params():
    """A value is found by name, metric and the params given, and missing is None."""
    rows = [ROW, Row("first sync", "iptables", {"services": 1000}, "work", 300.0, "ms")]
    assert value_of(rows, "first sync", "work", services=1000) == 300.0
    assert value_of(rows, "first sync", "work", services=7) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.6254, "0.625"), (41.07, "41.1"), (534.44, "534.4"), (2060.4, "2,060"), (11.0, "11"), (1173051.0, "1,173,051")],
)
def test_number(value, text):
    """Small values keep three figures, large ones all before the point."""
    assert number(value) == text


def test_table_names_command_machine_and_baseline():
    """The table stands under the command and machine it was measured with, and its columns line up."""
    other = Row("second", "iptables", {"services": 7}, "RSS", 1234.0, "MB")
    text = result_table(Result("x", MACHINE, [against(ROW, 20.0, "kernel apply"), other]))
    assert text.splitlines() == [
        "$ nodeplane bench drift-repair",
        "  2 x Some CPU, Linux 6.1.0, commit 0123456789ab",
        "  what        at            metric  value  unit  ratio  to",
        "  first sync  100 services  work       30  ms      1.5  kernel apply",
        "  second      7 services    RSS     1,234  MB",
    ]


def test_picture_is_a_png(tmp_path):
    """A result becomes a PNG file."""
    path = tmp_path / "deep" / "drift-repair.png"
    draw(Result("drift-repair", MACHINE, DRIFT), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_machine_facts(tmp_path):
    """The CPU's model is read where /proc/cpuinfo tells it, and a tree outside of a repository has no commit."""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU\n")
    assert cpu_name(tmp_path / "cpuinfo").endswith(" x Some CPU")
    assert commit(tmp_path) == "unknown"


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"name": "nothing"}, "bench: must be one of services-change, "),
        ({"services": 0}, "--services: must be at least 1, is 0"),
        ({"name": "lab-up", "services": 5}, "--services: lab-up has nodes and pods"),
        ({"name": "services-full", "mode": "ebpf"}, "--mode: must be one of iptables, ipvs, nftables, is 'ebpf'"),
    ],
)
def test_bad_usage(tmp_path, stated, words):
    """What cannot be measured as asked is refused before anything is measured."""
    with pytest.raises(Usage, match=words):
        run(arguments(results=tmp_path, **stated))
    assert list(tmp_path.iterdir()) == []


def test_every_benchmark_is_in_the_readme():
    """bench/README.md has a section for each benchmark."""
    text = Path(bench.__file__).with_name("README.md").read_text()
    assert [name for name in BENCHMARKS if f"\n## {name}\n" not in text] == []
