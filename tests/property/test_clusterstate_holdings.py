"""The first load takes a way of its own through what files hold; it must arrive where the general way does."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from clusterstate.objects import KubernetesObject
from clusterstate.parse import parse_object
from clusterstate.snapshot import Snapshot, edited
from clusterstate.sources.holdings import NOTHING, Holding, Holdings, held

NAMES = st.sampled_from(["a", "b", "c"])
SEEN = {"kind": "Namespace", "metadata": {"name": "here-from-the-start"}}


def slice_(name: str, service: str) -> dict[str, Any]:
    metadata = {"name": name, "labels": {"kubernetes.io/service-name": service}}
    return {"kind": "EndpointSlice", "metadata": metadata, "addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}]}


def service(name: str, port: int) -> dict[str, Any]:
    return {"kind": "Service", "metadata": {"name": name}, "spec": {"ports": [{"port": port}]}}


def endpoints(name: str) -> dict[str, Any]:
    return {
        "kind": "Endpoints",
        "metadata": {"name": name},
        "subsets": [{"addresses": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}],
    }


OBJECTS = (
    st.builds(slice_, NAMES, NAMES)
    | st.builds(service, NAMES, st.integers(0, 2))
    | st.builds(endpoints, NAMES)
    | NAMES.map(lambda name: {"kind": "Node", "metadata": {"name": name}})
)
FILES = st.dictionaries(st.sampled_from(["1", "2", "3"]), st.lists(OBJECTS, max_size=6))


def holding(path: str, items: list[dict[str, Any]]) -> Holding:
    return held(parse_object({"kind": "List", "items": items}, path), NOTHING)


def sorted_by_ref(objects: list[KubernetesObject]) -> list[KubernetesObject]:
    return sorted(objects, key=lambda one: one.ref)


@settings(max_examples=200, deadline=None)
@given(FILES)
def test_all_at_once_from_nothing_equals_one_after_the_other(contents):
    """Files taken in all at once where nothing was held give the snapshot, errors and news of files taken in beside another."""
    files = {path: holding(path, items) for path, items in contents.items()}
    first, later = Holdings(), Holdings()
    later.replace({"0": holding("0", [SEEN])})
    quick, general = first.replace(files), later.replace(files)
    assert (sorted_by_ref(quick.come), quick.gone) == (sorted_by_ref(general.come), general.gone)
    first.replace({"0": holding("0", [SEEN])})
    assert (first.snapshot, first.errors()) == (later.snapshot, later.errors())
    first.replace(dict.fromkeys([*files, "0"]))
    assert (first.snapshot, first.errors()) == (Snapshot(), ())


@settings(max_examples=200, deadline=None)
@given(st.lists(OBJECTS, max_size=8), st.lists(OBJECTS, max_size=8))
def test_an_edit_in_two_steps_equals_one(items, more):
    """Objects put into an empty snapshot, then others over them, are what all of them put in at once are; taken out, all is empty."""
    some, others = (list(parse_object({"kind": "List", "items": part}, "x").objects) for part in (items, more))
    at_once = edited(Snapshot(), (), [*some, *others])
    newer = {one.ref for one in others}
    replaced, kept = [one for one in some if one.ref in newer], [one for one in some if one.ref not in newer]
    assert edited(edited(Snapshot(), (), some), replaced, others) == edited(Snapshot(), (), [*kept, *others])
    assert edited(at_once, [*some, *others], ()) == Snapshot()
