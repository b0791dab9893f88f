"""Label and field selectors, as they stand in a URL.

    app=web,tier!=db,env in (a,b),!old      labels: all must hold
    metadata.name=web,spec.nodeName!=n1     fields: any path into the object

Source: k8s.io/apimachinery, pkg/labels/selector.go and pkg/fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from netnslab.api.refusal import bad_request

Raw: TypeAlias = dict[str, Any]
Selector: TypeAlias = Callable[[Raw], bool]

_IN = re.compile(r"\s*(?P<key>[^\s,()=!]+)\s+(?P<op>in|notin)\s*\((?P<values>[^()]*)\)\s*")
_COMPARED = re.compile(r"\s*(?P<key>[^\s,()=!]+)\s*(?P<op>==|=|!=)\s*(?P<value>[^\s,()=!]*)\s*")
_NAMED = re.compile(r"\s*(?P<not>!?)\s*(?P<key>[^\s,()=!]+)\s*")


def everything(_raw: Raw) -> bool:
    """Select every object."""
    return True


def selected(labels: str, fields: str) -> Selector:
    """Return what both selectors leave. Raises Refusal."""
    parts = [*_labels(labels), *_fields(fields)]
    return (lambda raw: all(part(raw) for part in parts)) if parts else everything


def _labels(text: str) -> list[Selector]:
    found: list[Selector] = []
    at = 0
    while at < len(text.rstrip()):
        match = _IN.match(text, at) or _COMPARED.match(text, at) or _NAMED.match(text, at)
        if match is None or (match.end() < len(text) and text[match.end()] != ","):
            raise bad_request(f"unable to parse requirement: labelSelector {text!r} at {text[at:]!r}")
        found.append(_requirement(match.groupdict()))
        at = match.end() + 1
    return found


def _requirement(said: Mapping[str, str]) -> Selector:
    key = said["key"]
    if "values" in said:
        values = {value.strip() for value in said["values"].split(",")}
        if said["op"] == "in":
            return lambda raw: _of(raw).get(key) in values
        return lambda raw: _of(raw).get(key) not in values
    if "value" in said:
        value = said["value"]
        if said["op"] == "!=":
            return lambda raw: _of(raw).get(key) != value
        return lambda raw: _of(raw).get(key) == value
    if said["not"]:
        return lambda raw: key not in _of(raw)
    return lambda raw: key in _of(raw)


def _of(raw: Raw) -> Mapping[str, str]:
    return raw["metadata"].get("labels") or {}


def _fields(text: str) -> list[Selector]:
    found: list[Selector] = []
    for part in filter(None, text.split(",")):
        match = _COMPARED.fullmatch(part)
        if match is None:
            raise bad_request(f"invalid field selector {text!r}: unable to parse {part!r}")
        found.append(_field(match["key"].split("."), match["value"], match["op"] != "!="))
    return found


def _field(path: list[str], value: str, wanted: bool) -> Selector:
    def holds(raw: Raw) -> bool:
        at: Any = raw
        for step in path:
            at = at.get(step) if isinstance(at, dict) else None
        return (("" if at is None else str(at)) == value) is wanted

    return holds
