"""Whether the labs of a test follow files or an API server: as the test says, or all alike with LAB_SOURCE=files or LAB_SOURCE=api."""

from __future__ import annotations

import os

SOURCES = ("files", "api")


def up_options(wanted: str = "files") -> list[str]:
    """Return what `lab up` is to be told besides. Raises ValueError."""
    source = os.environ.get("LAB_SOURCE") or wanted
    if source not in SOURCES:
        raise ValueError(f"LAB_SOURCE: must be one of {', '.join(SOURCES)}, is {source!r}")
    return ["--api"] if source == "api" else []
