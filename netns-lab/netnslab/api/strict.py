"""Fields that a kind does not have, found by the types of the official client: what ``fieldValidation=Strict`` refuses.

Kinds that the client does not know (ClusterNetworkPolicy) are not checked here; what they hold is read by ``clusterstate``.
Source: KEP-2885 (server-side unknown field validation); kubernetes.client.models.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from netnslab.api.kinds import Kind

MODELS = {"Endpoints": "V1Endpoints", "Event": "CoreV1Event"}
"""Where a model is not called V1 and its kind."""
LEFT_OUT = frozenset({"managedFields"})
_HOLDER = re.compile(r"([Ll]ist|[Dd]ict)[\[(](?:str, ?)?(.+?)[\])]")
"""The client has written these types in more than one way."""


def unknown_fields(kind: Kind, raw: Any) -> list[str]:
    """Return the paths of unknown fields, as kubectl shows them: ``spec.ports[0].prot``."""
    name = MODELS.get(kind.kind, f"V1{kind.kind}")
    return list(_unknown(name, raw, "")) if _model(name) else []


@functools.cache
def _model(name: str) -> dict[str, str] | None:
    """Return a model's fields, with their types; None for one that the client does not have."""
    from kubernetes.client import models  # noqa: PLC0415  (takes a second, and only a server needs it)

    found = getattr(models, name, None)
    if found is None or not hasattr(found, "attribute_map"):
        return None
    return {found.attribute_map[attribute]: declared for attribute, declared in found.openapi_types.items()}


def _unknown(declared: str, value: Any, path: str) -> Iterator[str]:
    holder = _HOLDER.fullmatch(declared)
    if holder is not None:
        inner = holder[2]
        if isinstance(value, list):
            for i, one in enumerate(value):
                yield from _unknown(inner, one, f"{path}[{i}]")
        elif isinstance(value, dict) and holder[1].lower() == "dict":
            for key, one in value.items():
                yield from _unknown(inner, one, f"{path}.{key}".removeprefix("."))
        return
    fields = _model(declared) if isinstance(value, dict) else None
    if not fields:
        return
    for key, one in value.items():
        inside = f"{path}.{key}".removeprefix(".")
        if key not in fields:
            yield inside
        elif key not in LEFT_OUT:
            yield from _unknown(fields[key], one, inside)
