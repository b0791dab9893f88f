"""The page of all measurements: what is in a directory, in the order of the benchmarks, and where it comes from."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from bench.page import write_page
from bench.result import Machine, Result, Row, write_result
from bench.run import run
from nodeplane.commands import Failed

ROW = Row("new", "nftables", {"services": 10, "baseline": "<none>"}, "cost", 1234.0, "ns", 1.25)


def result(bench: str, commit: str = "abc", command: str = "") -> Result:
    return Result(bench, Machine("6.18", "2 x CPU", commit, command or f"nodeplane bench {bench}"), [ROW])


def headings(page: str) -> list[str]:
    return re.findall(r'<h2 id="([^"]*)">', page)


def test_everything_there_is(tmp_path: Path) -> None:
    """Sections are in the order of the benchmarks, variants behind their own; pictures that exist are shown, foreign files are not."""
    for name in ("overlay", "packet-cost", "unknown"):
        write_result(result(name), tmp_path)
    write_result(result("packet-cost"), tmp_path).rename(tmp_path / "packet-cost-nftables.json")
    write_result(result("packet-cost"), tmp_path)
    (tmp_path / "notes.json").write_text('{"hello": 1}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "overlay.png").write_bytes(b"")
    path = write_page(tmp_path, ("packet-cost", "overlay"))
    assert path == tmp_path / "index.html"
    page = path.read_text()
    assert headings(page) == ["packet-cost", "packet-cost-nftables", "overlay", "unknown"]
    assert re.findall(r'<img src="([^"]*)"', page) == ["overlay.png"]
    assert "$ nodeplane bench overlay" in page
    assert "2 x CPU, Linux 6.18, commit abc" in page
    assert "several machines" not in page
    assert "<td>10 services</td>" in page
    assert '<td class="number">1,234</td>' in page
    assert "<td>&lt;none&gt;</td>" in page


def test_several_commits_are_said_to_be_so(tmp_path: Path) -> None:
    """Where results are of several commits the page begins with that."""
    write_result(result("overlay", "abc"), tmp_path)
    write_result(result("packet-cost", "def"), tmp_path)
    path = write_page(tmp_path, ())
    assert path is not None
    assert "compare within a section only" in path.read_text()


def test_only_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``bench page`` measures nothing; without results there is nothing to show."""
    args = argparse.Namespace(name="page", services=None, mode=None, results=tmp_path, output="text")
    with pytest.raises(Failed, match="holds no results"):
        run(args)
    write_result(result("overlay"), tmp_path)
    assert run(args) == 0
    assert capsys.readouterr().out == f"{tmp_path}/index.html\n"
