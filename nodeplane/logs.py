"""How the agent logs: lines for people, or one JSON object a line for machines.

    text   2026-11-26 11:00:00,123 INFO nodeplane.agent: changed 3 in netfilter, 1.2 ms
    json   {"ts":1795950000123.4,"level":"info","logger":"nodeplane.agent","msg":"changed 3 in netfilter, 1.2 ms"}

JSON has the fields of Kubernetes' components: ``ts`` in milliseconds since the epoch, ``msg``, and ``err`` with a traceback.
"""

from __future__ import annotations

import logging
import sys

import msgspec

from nodeplane.config_node import LogOptions

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
LOUD = 4
"""The verbosity from which on everything is logged."""


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
        said = {
            "ts": round(record.created * 1000, 1),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        if record.exc_info:
            said["err"] = self.formatException(record.exc_info)
        return msgspec.json.encode(said).decode()


def set_up(options: LogOptions, *, verbose: bool = False) -> None:
    """Log this way from now on, to stderr."""
    root = logging.getLogger()
    formatter = JsonFormatter() if options.format == "json" else logging.Formatter(TEXT)
    if not root.handlers:
        root.addHandler(logging.StreamHandler(sys.stderr))
    for handler in root.handlers:
        handler.setFormatter(formatter)
    root.setLevel(logging.DEBUG if verbose or options.verbosity >= LOUD else logging.INFO)
