"""YAML as Kubernetes manifests mean it: plain words stay strings where YAML 1.1 sees dates and base-60 numbers.

``12:30`` is a string and not 750, ``2026-11-25`` a string and not a date, as in Go's YAML, which everybody's manifests were tried
with. ``on`` and ``no`` are still booleans there, and here: a label of that value needs quotes, and the error says so by its type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

try:
    from yaml import CSafeLoader as _Base
except ImportError:  # PyYAML built without libyaml: the same words, some ten times slower
    from yaml import SafeLoader as _Base  # type: ignore[assignment]

_INT = re.compile(r"[-+]?(?:0b[01_]+|0[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_KEPT = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")


class _Loader(_Base):
    """PyYAML's safe loader with its own table of plain words."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own class attribute)
        first: [
            *((tag, pattern) for tag, pattern in _Base.yaml_implicit_resolvers.get(first, ()) if tag in _KEPT),
            *((("tag:yaml.org,2002:int", _INT), ("tag:yaml.org,2002:float", _FLOAT)) if first in "-+.0123456789" else ()),
        ]
        for first in {*_Base.yaml_implicit_resolvers, *"-+.0123456789"}
    }


def load_documents(data: bytes) -> Iterator[Any]:
    """Yield each document, as far as they can be read. Raises yaml.YAMLError and ValueError."""
    loader: Any = _Loader(data)
    try:
        while loader.check_data():
            yield loader.get_data()
    finally:
        loader.dispose()
