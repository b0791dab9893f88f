"""Pictures."""
from pathlib import Path
from bench.result import Result
def draw(result: Result, path: Path) -> None: ...
