"""One page of everything that was measured: machine, commands, pictures and tables, side by side.

    DIR/*.json, DIR/*.png --> DIR/index.html

The page holds what is in the directory, whenever and wherever that was measured; results of several machines or commits are said to be
so at the top, because only values of one run are to be compared. Decides how it looks; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import msgspec

from bench.result import Machine, Result, table_cells

FILE = "index.html"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222 }
img { max-width: 100%; height: auto; border: 1px solid #ddd }
code { background: #f3f3f3; padding: .1em .4em }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .15em .8em; text-align: left }
tr:nth-child(even) { background: #f7f7f7 } .number { text-align: right; font-variant-numeric: tabular-nums }
.warning { color: #a33 }
"""
RIGHT = frozenset({"value", "ratio"})


def write_page(directory: Path, order: Sequence[str]) -> Path | None:
    """Write the page of a directory's results, in this order of names; return its path, None where there are no results."""
    results = list(_results(directory, order))
    if not results:
        return None
    path = directory / FILE
    path.write_text("\n".join(_lines(results, directory)) + "\n")
    return path


def _results(directory: Path, order: Sequence[str]) -> Iterator[tuple[str, Result]]:
    """Yield the names of files and what they hold: those with a name in this order first, variants of them (NAME-x.json) behind them."""
    files = {file.stem: file for file in sorted(directory.glob("*.json"))}

    def place(stem: str) -> tuple[int, str]:
        known = (number for number, name in enumerate(order) if stem == name or stem.startswith(f"{name}-"))
        return next(known, len(order)), stem

    for stem in sorted(files, key=place):
        try:
            yield stem, msgspec.json.decode(files[stem].read_bytes(), type=Result)
        except msgspec.DecodeError:
            continue  # not one of ours


def _lines(results: Sequence[tuple[str, Result]], directory: Path) -> Iterator[str]:
    yield '<!doctype html><html lang="en"><meta charset="utf-8"><title>nodeplane bench</title>'
    yield f"<style>{STYLE}</style>"
    yield "<h1>What things cost</h1>"
    yield "<p>Ratios of one run are what counts: milliseconds change with the machine, its neighbours and the weather.</p>"
    yield from _machines([result.machine for _, result in results])
    yield f"<p>{' · '.join(f'<a href=#{escape(stem)}>{escape(stem)}</a>' for stem, _ in results)}</p>"
    for stem, result in results:
        yield from _section(stem, result, directory)


def _machines(machines: Sequence[Machine]) -> Iterator[str]:
    facts = list(dict.fromkeys((m.cpu, m.kernel, m.commit) for m in machines))
    if len(facts) > 1:
        yield '<p class="warning">Measured on several machines or commits: compare within a section only.</p>'
    yield from (f"<p>{escape(cpu)}, Linux {escape(kernel)}, commit {escape(commit)}</p>" for cpu, kernel, commit in facts)


def _section(stem: str, result: Result, directory: Path) -> Iterator[str]:
    machine = result.machine
    yield f'<h2 id="{escape(stem)}">{escape(stem)}</h2>'
    yield f"<p><code>$ {escape(machine.command)}</code> commit {escape(machine.commit)}</p>"
    if (directory / f"{stem}.png").exists():
        yield f'<p><img src="{escape(stem)}.png" alt="{escape(stem)}"></p>'
    head, *rows = table_cells(result)
    yield f"<details><summary>{len(rows)} rows</summary><table>"
    yield f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"
    for row in rows:
        cells = (
            f'<td class="number">{escape(cell)}</td>' if name in RIGHT else f"<td>{escape(cell)}</td>"
            for name, cell in zip(head, row, strict=True)
        )
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</table></details>"
