"""What is wrong with a field, in words: which path, which value, and what it had to be.

Decides how an error reads. What counts as wrong is decided by ``wire.py`` (types) and the ``parse_*`` modules (values).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_LONGEST = 80
_MESSAGE = re.compile(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>.*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_EXPECTED = re.compile(r"Expected `([^`]*)`.*", re.DOTALL)
_STEP = re.compile(r"\.([A-Za-z]+)|\[(\d+|\.\.\.)\]")
_WORDS = {"int": "a whole number", "str": "a string", "bool": "true or false", "array": "a list", "object": "an object"}


class Fault(Exception):  # noqa: N818 (it never leaves this package: it becomes an ObjectError)
    """A field with a value that cannot stand: ``path`` such as ``spec.ports[0].port``, and what is wrong with it."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(path, reason)

    def under(self, path: str) -> Fault:
        """Return it as seen from further out: ``port`` under ``spec.ports[0]`` is ``spec.ports[0].port``.

        Paths are put together on the way out, so that an object without faults, the usual one, pays for none.
        """
        return Fault(f"{path}.{self.path}" if self.path else path, self.reason)


def shown(value: Any) -> str:
    """Print a value for an error message: as JSON, at most about 80 characters."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        return f"a {type(value).__name__}"
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"
    return json.dumps(cut, ensure_ascii=False) if isinstance(value, str) else cut


def type_fault(message: str, raw: Any) -> Fault:
    """Turn msgspec's words about a wrong type (``Expected `int`, got `str` - at `$.spec.ports[0].port```) into ours.

    ``raw`` is the decoded object, in which the offending value is looked up: msgspec does not tell it.
    """
    found = _MESSAGE.fullmatch(message)
    what, path = (found["what"], found["path"] or "") if found else (message, "")
    unknown = _UNKNOWN.fullmatch(what)
    if unknown is not None:
        steps, value = _follow(path, raw)
        held = value.get(unknown[1]) if isinstance(value, Mapping) else None
        return Fault(f"{steps}.{unknown[1]}".removeprefix("."), f"is not known here, is {shown(held)}")
    expected = _EXPECTED.fullmatch(what)
    if expected is None:
        return Fault(path.removeprefix("."), what)
    kinds = [kind for kind in expected[1].split(" | ") if kind != "null"]
    steps, value = _follow(path, raw)
    if found and found["key"]:
        odd = next((key for key in value if not isinstance(key, str)), None) if isinstance(value, Mapping) else None
        return Fault(steps, f"must have strings as keys, has {shown(odd)}")
    return Fault(steps, f"must be {' or '.join(_WORDS.get(kind, kind) for kind in kinds)}, is {shown(value)}")


def _follow(path: str, raw: Any) -> tuple[str, Any]:
    """Walk a path into a value. ``[...]`` is some key of a mapping of strings: the first one that holds no string."""
    walked, value = "", raw
    for step in _STEP.finditer(path):
        name, index = step.groups()
        if index == "..." and isinstance(value, Mapping):
            name = next((str(key) for key, entry in value.items() if not isinstance(entry, str)), "")
            walked, value = f"{walked}[{name}]", value.get(name)
        elif index and isinstance(value, Sequence):
            walked, value = f"{walked}[{index}]", value[int(index)]
        else:
            walked = f"{walked}.{name}" if walked else str(name)
            value = value.get(name) if isinstance(value, Mapping) else None
    return walked, value
