"""A measurement in a process of its own: its memory is its own, and no earlier measurement has warmed or filled anything.

measuring process                                          this process
  in_fresh_process("bench.x:f", {...})  -- argv -->   python -m bench.fresh bench.x:f '{...}'
  decoded answer                        <-- stdout --  JSON of what f returned
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from nodeplane.commands import Failed

T = TypeVar("T")
LONGEST = 900.0
"""Seconds until a measurement is given up."""


def in_fresh_process(function: str, params: Mapping[str, Any], answer: type[T]) -> T:
    """Call ``module:function`` with ``params`` in a new interpreter and decode what it returns. Raises Failed."""
    command = [sys.executable, "-m", "bench.fresh", function, msgspec.json.encode(params).decode()]
    try:
        done = subprocess.run(command, capture_output=True, timeout=LONGEST, check=False)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{function}: not done after {LONGEST:g} s") from error
    if done.returncode != 0:
        raise Failed(f"{function}: {done.stderr.decode(errors='replace').strip() or f'exit status {done.returncode}'}")
    return msgspec.json.decode(done.stdout, type=answer)


def memory(field: str, status: Path = Path("/proc/self/status")) -> float:
    """Return a size of this process in MB (10^6 bytes): ``VmRSS`` now, ``VmHWM`` the largest RSS so far. Source: proc(5)."""
    for line in status.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024 / 1e6
    raise LookupError(f"{status}: has no {field}")


def main() -> None:
    """Do as ``in_fresh_process`` asked."""
    module, _, name = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), name)(**msgspec.json.decode(sys.argv[2]))
    sys.stdout.buffer.write(msgspec.json.encode(result))


if __name__ == "__main__":
    main()
