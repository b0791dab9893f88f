"""The lab's API server: patches, as kubectl sends them."""

from __future__ import annotations

import copy

import pytest

from netnslab.api.patch import json_patch, merge, strategic
from netnslab.api.refusal import Refusal

SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web", "annotations": {"a": "1"}, "finalizers": ["x", "y"]},
    "spec": {
        "selector": {"app": "web"},
        "externalIPs": ["80.11.12.10"],
        "ports": [{"name": "http", "port": 80, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}],
    },
}


def ports(*numbers):
    return [port for port in SERVICE["spec"]["ports"] if port["port"] in numbers]


@pytest.mark.parametrize(
    ("patch", "path", "wanted"),
    [
        ({"metadata": {"annotations": {"b": "2"}}}, ("metadata", "annotations"), {"a": "1", "b": "2"}),
        ({"metadata": {"annotations": {"a": None}}}, ("metadata", "annotations"), {}),
        ({"metadata": {"annotations": None}}, ("metadata", "annotations"), None),
        ({"spec": {"externalIPs": ["1.1.1.1"]}}, ("spec", "externalIPs"), ["1.1.1.1"]),
        (
            {"spec": {"ports": [{"port": 80, "nodePort": 30080}]}},
            ("spec", "ports"),
            [{**ports(80)[0], "nodePort": 30080}, *ports(53)],
        ),
        ({"spec": {"ports": [{"port": 443}]}}, ("spec", "ports"), [*ports(80, 53), {"port": 443}]),
        ({"spec": {"ports": [{"$patch": "delete", "port": 53}]}}, ("spec", "ports"), ports(80)),
        (
            {"spec": {"ports": [{"port": 53, "protocol": "TCP"}]}},
            ("spec", "ports"),
            [*ports(80, 53), {"port": 53, "protocol": "TCP"}],
        ),
        ({"spec": {"ports": [{"$patch": "replace"}, {"port": 1}]}}, ("spec", "ports"), [{"port": 1}]),
        ({"spec": {"$setElementOrder/ports": [{"port": 53}, {"port": 80}]}}, ("spec", "ports"), [*ports(53), *ports(80)]),
        ({"spec": {"selector": {"$patch": "replace", "x": "y"}}}, ("spec", "selector"), {"x": "y"}),
        ({"spec": {"selector": {"$retainKeys": ["tier"], "tier": "db"}}}, ("spec", "selector"), {"tier": "db"}),
        ({"metadata": {"finalizers": ["z"]}}, ("metadata", "finalizers"), ["x", "y", "z"]),
        ({"metadata": {"$deleteFromPrimitiveList/finalizers": ["x"]}}, ("metadata", "finalizers"), ["y"]),
    ],
)
def test_strategic_merge(patch, path, wanted):
    """A strategic merge patch does what its directives say, to lists by the key of their members; what it is given stays as it was."""
    before = copy.deepcopy(SERVICE)
    found = strategic(SERVICE, patch)
    for step in path:
        found = found.get(step)
    assert found == wanted
    assert before == SERVICE


def test_lists_of_slices_and_policies_are_whole():
    """In kinds whose lists are atomic a list replaces the one before, whatever its field is called."""
    one = {"kind": "EndpointSlice", "metadata": {"name": "a", "labels": {"x": "1"}}, "ports": [{"name": "a", "port": 1}]}
    found = strategic(one, {"metadata": {"labels": {"y": "2"}}, "ports": [{"name": "b", "port": 2}]})
    assert found == {
        "kind": "EndpointSlice",
        "metadata": {"name": "a", "labels": {"x": "1", "y": "2"}},
        "ports": [{"name": "b", "port": 2}],
    }


def test_a_member_without_its_key_is_refused():
    """A member of a merged list that does not say which one it is makes no sense."""
    with pytest.raises(Refusal, match="declared merge key: port"):
        strategic(SERVICE, {"spec": {"ports": [{"name": "http"}]}})


@pytest.mark.parametrize(
    ("target", "patch", "wanted"),
    [  # the examples of RFC 7386, appendix A
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch(target, patch, wanted):
    """A JSON merge patch is that of RFC 7386."""
    assert merge(target, patch) == wanted


@pytest.mark.parametrize(
    ("operations", "wanted"),
    [  # after RFC 6902, appendix A
        ([{"op": "add", "path": "/baz", "value": 1}], {"foo": ["bar", "qux"], "baz": 1}),
        ([{"op": "add", "path": "/foo/1", "value": "x"}], {"foo": ["bar", "x", "qux"]}),
        ([{"op": "add", "path": "/foo/-", "value": "x"}], {"foo": ["bar", "qux", "x"]}),
        ([{"op": "remove", "path": "/foo/0"}], {"foo": ["qux"]}),
        ([{"op": "replace", "path": "/foo", "value": 1}], {"foo": 1}),
        ([{"op": "move", "from": "/foo/0", "path": "/a~1b"}], {"foo": ["qux"], "a/b": "bar"}),
        ([{"op": "copy", "from": "/foo/1", "path": "/c"}], {"foo": ["bar", "qux"], "c": "qux"}),
        ([{"op": "test", "path": "/foo/0", "value": "bar"}], {"foo": ["bar", "qux"]}),
    ],
)
def test_json_patch(operations, wanted):
    """A JSON patch does each operation of RFC 6902."""
    assert json_patch({"foo": ["bar", "qux"]}, operations, "Pod", "x") == wanted


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "remove", "path": "/nope"},
        {"op": "replace", "path": "/nope", "value": 1},
        {"op": "add", "path": "/foo/7", "value": 1},
        {"op": "test", "path": "/foo/0", "value": "x"},
        {"op": "fly", "path": "/foo"},
        {"path": "/foo"},
        {"op": "add", "path": "foo", "value": 1},
    ],
)
def test_json_patch_that_cannot_be(operation):
    """An operation that cannot be done is refused as invalid, and named."""
    with pytest.raises(Refusal) as refused:
        json_patch({"foo": ["bar"]}, [operation], "Pod", "x")
    assert refused.value.code == 422
