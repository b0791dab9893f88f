"""Patches: JSON merge patch (RFC 7386), JSON patch (RFC 6902) and Kubernetes' strategic merge patch.

A strategic merge patch merges lists of objects by a key of theirs instead of replacing them, and knows directives:

    {"ports": [{"port": 80, "nodePort": 30080}]}              the port with that number gets a nodePort
    {"ports": [{"$patch": "delete", "port": 80}]}             that port goes
    {"$setElementOrder/ports": [{"port": 81}, {"port": 80}]}  and this is their order
    {"$deleteFromPrimitiveList/finalizers": ["x"]}            of a list of words
    {"$retainKeys": ["type"]}                                 fields that are not among these go

What cannot be told from the object (which lists are merged, and by what) is the table ``MERGED``.
Source: k8s.io/apimachinery, pkg/util/strategicpatch; the patchMergeKey tags of k8s.io/api.
"""

from __future__ import annotations

import copy
from typing import Any

from netnslab.api.refusal import bad_request, invalid
from netnslab.api.selectors import Raw

MERGED: dict[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "ephemeralContainers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "volumeMounts": ("mountPath",),
    "imagePullSecrets": ("name",),
    "hostAliases": ("ip",),
    "ports": ("port", "containerPort"),
    "conditions": ("type",),
    "addresses": ("type",),
    "ownerReferences": ("uid",),
    "taints": ("key",),
    "podIPs": ("ip",),
    "hostIPs": ("ip",),
}
"""Which of an object's lists are merged, by which field of their members; the first that a member has."""
WORDS = frozenset({"finalizers", "podCIDRs"})
"""Lists of words that are merged."""
WHOLE = frozenset({"EndpointSlice", "Endpoints", "NetworkPolicy", "ClusterNetworkPolicy", "ServiceCIDR"})
"""Kinds without a merged list, but for those of their metadata."""
ORDER, DROP = "$setElementOrder/", "$deleteFromPrimitiveList/"


def merge(target: Any, patch: Any) -> Any:
    """Apply a JSON merge patch; nothing handed in is changed."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    found = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merge(found.get(key), value)
    return found


# -- strategic ---------------------------------------------------------------------------------------------------------


def strategic(target: Raw, patch: Raw) -> Raw:
    """Apply a strategic merge patch; nothing handed in is changed. Raises Refusal."""
    if target.get("kind") in WHOLE:
        rest = merge(target, {key: value for key, value in patch.items() if key != "metadata"})
        return {**rest, "metadata": _object(target["metadata"], patch.get("metadata") or {})}
    return _object(target, patch)


def _object(target: Raw, patch: Raw) -> Raw:
    match patch.get("$patch"):
        case "replace":
            return {key: copy.deepcopy(value) for key, value in patch.items() if key != "$patch"}
        case "delete":
            return {}
        case None | "merge":
            pass
        case other:
            raise bad_request(f"invalid value of $patch: {other!r}")
    found = dict(target)
    if "$retainKeys" in patch:
        found = {key: value for key, value in found.items() if key in patch["$retainKeys"]}
    for key, value in patch.items():
        if key.startswith(DROP):
            name = key.removeprefix(DROP)
            found[name] = [one for one in found.get(name) or [] if one not in value]
        elif key.startswith("$"):
            continue
        elif value is None:
            found.pop(key, None)
        else:
            found[key] = _field(key, found.get(key), value)
    for key, value in patch.items():
        if key.startswith(ORDER) and isinstance(found.get(name := key.removeprefix(ORDER)), list):
            found[name] = _ordered(name, found[name], value)
    return found


def _field(key: str, target: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return _object(target if isinstance(target, dict) else {}, value)
    if isinstance(value, list) and key in WORDS:
        have = list(target or [])
        return have + [one for one in value if one not in have]
    if isinstance(value, list) and key in MERGED and all(isinstance(one, dict) for one in value):
        return _list(key, target or [], value)
    return copy.deepcopy(value)


def _list(key: str, target: list[Raw], patch: list[Raw]) -> list[Raw]:
    found = list(target)
    if any(one.get("$patch") == "replace" for one in patch):
        return [one for one in patch if "$patch" not in one]
    for one in patch:
        at = next((i for i, have in enumerate(found) if _is_same(key, one, have)), None)
        if one.get("$patch") == "delete":
            if at is not None:
                del found[at]
        elif at is None:
            found.append(_object({}, one))
        else:
            found[at] = _object(found[at], one)
    return found


def _is_same(key: str, one: Raw, have: Raw) -> bool:
    """Tell whether a member of a patch speaks of a member of a list. Ports of two protocols may share a number."""
    field = next((field for field in MERGED[key] if field in one), None)
    if field is None:
        raise bad_request(f"map: {one} does not contain declared merge key: {MERGED[key][0]}")
    protocol = one.get("protocol") if key == "ports" else None
    return have.get(field) == one[field] and protocol in {None, have.get("protocol") or "TCP"}


def _ordered(key: str, members: list[Any], order: list[Any]) -> list[Any]:
    """Bring members into a stated order; those that it does not name keep their place behind their neighbours."""

    def name(one: Any) -> Any:
        if not isinstance(one, dict):
            return one
        field = next((field for field in MERGED.get(key, ("name",)) if field in one), "name")
        return one.get(field)

    wanted = {name(one): i for i, one in enumerate(order)}
    last, ranks = -1, []
    for i, one in enumerate(members):
        last = wanted.get(name(one), last)
        ranks.append((last, i))
    return [members[i] for _, i in sorted(ranks)]


# -- JSON patch --------------------------------------------------------------------------------------------------------


def json_patch(target: Raw, operations: Any, kind: str, name: str) -> Raw:
    """Apply a JSON patch. Raises Refusal, naming the operation that cannot be done."""
    if not isinstance(operations, list):
        raise bad_request("a JSON patch is a list of operations")
    found: Any = copy.deepcopy(target)
    for one in operations:
        try:
            found = _operate(found, one)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise invalid(kind, "", name, "patch", f"{one}: {error}") from error
    return dict(found)


def _operate(document: Any, one: Raw) -> Any:
    path, word = _path(one["path"]), one["op"]
    match word:
        case "add" | "replace":
            return _set(document, path, copy.deepcopy(one["value"]), insert=word == "add")
        case "remove":
            return _drop(document, path)
        case "move":
            value = _at(document, _path(one["from"]))
            return _set(_drop(document, _path(one["from"])), path, value, insert=True)
        case "copy":
            return _set(document, path, copy.deepcopy(_at(document, _path(one["from"]))), insert=True)
        case "test":
            if _at(document, path) != one["value"]:
                raise ValueError("the test failed")
            return document
        case _:
            raise ValueError(f"unknown op {word!r}")


def _path(text: str) -> list[str]:
    if text and not text.startswith("/"):
        raise ValueError(f"a path begins with /, is {text!r}")
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]


def _at(document: Any, path: list[str]) -> Any:
    for step in path:
        document = document[int(step)] if isinstance(document, list) else document[step]
    return document


def _set(document: Any, path: list[str], value: Any, *, insert: bool) -> Any:
    if not path:
        return value
    holder, last = _at(document, path[:-1]), path[-1]
    if isinstance(holder, list):
        at = len(holder) if last == "-" else int(last)
        if not 0 <= at <= len(holder) - (not insert):
            raise IndexError(f"no index {last}")
        if insert:
            holder.insert(at, value)
        else:
            holder[at] = value
    else:
        if not insert and last not in holder:
            raise KeyError(last)
        holder[last] = value
    return document


def _drop(document: Any, path: list[str]) -> Any:
    holder, last = _at(document, path[:-1]), path[-1]
    del holder[int(last) if isinstance(holder, list) else last]
    return document
