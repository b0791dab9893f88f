"""The lab's API server: versions, history, selectors, and what those who watch are told."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest

from netnslab.api import store as stores
from netnslab.api.kinds import POD, SERVICE
from netnslab.api.refusal import Refusal
from netnslab.api.selectors import everything, selected
from netnslab.api.store import Store
from netnslab.api.watches import Watch


def made():
    numbers = itertools.count(1)
    return Store(lambda: "2026-01-01T00:00:00Z", lambda: f"uid-{next(numbers)}")


def pod(name, **labels):
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default", "labels": labels}}


def put(store, name, **labels):
    key = ("default", name)
    if store.find(POD, key) is None:
        return store.create(POD, key, pod(name, **labels))
    return store.replace(POD, key, pod(name, **labels))


def test_versions_go_up_and_stay_with_their_objects():
    """Every change has a version of its own; what did not differ has none; uid and creation time stay."""
    store = made()
    first = put(store, "a", x="1")
    other = put(store, "b")
    again = put(store, "a", x="2")
    assert [first.version, other.version, again.version] == [2, 3, 4]
    assert put(store, "a", x="2") is again
    assert store.version == 4
    assert again.raw["metadata"]["uid"] == first.raw["metadata"]["uid"] == "uid-1"
    assert again.raw["metadata"]["resourceVersion"] == "4"
    assert first.raw["metadata"]["labels"] == {"x": "1"}, "what somebody still holds is not changed"


def test_an_object_is_created_once_and_removed_once():
    """A second object of a name is refused as 409, the removal of none as 404."""
    store = made()
    put(store, "a")
    with pytest.raises(Refusal) as twice:
        store.create(POD, ("default", "a"), pod("a"))
    store.remove(POD, ("default", "a"))
    with pytest.raises(Refusal) as gone:
        store.remove(POD, ("default", "a"))
    assert (twice.value.code, gone.value.code, gone.value.reason) == (409, 404, "NotFound")


def test_history_goes_back_so_far(monkeypatch):
    """A watch goes on from any version that is remembered; from an older one, and from one that never was, it is 410."""
    monkeypatch.setattr(stores, "HISTORY", 3)
    store = made()
    for number in range(6):
        put(store, "a", x=str(number))
    assert [change.version for change in store.changes(store.floor)] == [5, 6, 7]
    for version in (store.floor - 1, store.version + 1):
        with pytest.raises(Refusal) as refused:
            store.changes(version)
        assert (refused.value.code, refused.value.reason) == (410, "Expired")
    assert list(store.changes(store.version)) == []


def test_a_life_goes_on_after_another():
    """Objects of an earlier life keep their versions and uids, and the next change has a later version than any there was."""
    store = made()
    store.resume(40)
    store.load(POD, ("default", "a"), {**pod("a"), "metadata": {**pod("a")["metadata"], "uid": "u", "resourceVersion": "7"}})
    assert store.get(POD, ("default", "a")).raw["metadata"]["uid"] == "u"
    assert put(store, "b").version == 41
    with pytest.raises(Refusal):
        store.changes(39)


@pytest.mark.parametrize(
    ("labels", "fields", "names"),
    [
        ("app=web", "", "a"),
        ("app==web", "", "a"),
        ("app!=web", "", "bc"),
        ("app in (web, db)", "", "ab"),
        ("app notin (web),tier", "", "b"),
        ("!app", "", "c"),
        ("tier", "", "ab"),
        ("app=web,tier=2", "", ""),
        ("", "metadata.name=b", "b"),
        ("", "metadata.name!=b,metadata.namespace=default", "ac"),
        ("tier", "spec.nodeName=", "ab"),
        ("", "", "abc"),
    ],
)
def test_selectors(labels, fields, names):
    """Label and field selectors leave what Kubernetes' do."""
    objects = [pod("a", app="web", tier="1"), pod("b", app="db", tier="2"), pod("c")]
    choose = selected(labels, fields)
    assert "".join(one["metadata"]["name"] for one in objects if choose(one)) == names


@pytest.mark.parametrize(("labels", "fields"), [("app=(", ""), ("a=b c=d", ""), ("", "metadata.name"), ("=x", "")])
def test_selectors_that_cannot_be_read(labels, fields):
    """A selector that is none is refused, with its text."""
    with pytest.raises(Refusal) as refused:
        selected(labels, fields)
    assert refused.value.code == 400


def told(watch):
    lines = asyncio.run(watch.lines())
    return [(one["type"], one["object"]["metadata"].get("name")) for one in map(json.loads, lines.splitlines())]


def watching(store, *, choose=everything, bookmarks=False):
    watch = Watch(POD, "", choose, lambda entry: entry.encoded, bookmarks=bookmarks, since=store.version)
    store.watch(watch.take)
    return watch


def test_what_a_selector_lets_in_and_out_is_added_and_deleted():
    """An object that begins to be selected is ADDED to a watch, one that ceases to be is DELETED, whatever happened to it."""
    store = made()
    watch = watching(store, choose=selected("app=web", ""))
    put(store, "a", app="db")
    put(store, "a", app="web")
    put(store, "a", app="web", tier="1")
    put(store, "a", app="db")
    store.remove(POD, ("default", "a"))
    put(store, "b", app="web")
    store.remove(POD, ("default", "b"))
    assert told(watch) == [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a"), ("ADDED", "b"), ("DELETED", "b")]


def test_a_watch_is_of_one_kind_and_bookmarks_are_for_those_who_want_them():
    """A watch hears nothing of other kinds; one that asked for bookmarks hears of every version that is complete, once."""
    store = made()
    quiet, keen = watching(store), watching(store, bookmarks=True)
    store.create(SERVICE, ("default", "s"), {"metadata": {"name": "s", "namespace": "default"}})
    for watch in (quiet, keen):
        watch.bookmark(store.version)
        watch.bookmark(store.version)
    put(store, "a")
    for watch in (quiet, keen):
        watch.bookmark(store.version)
    assert told(quiet) == [("ADDED", "a")]
    assert told(keen) == [("BOOKMARK", None), ("ADDED", "a")]


def test_a_watch_that_cannot_keep_up_is_ended(monkeypatch):
    """Where nobody takes the lines there is an end to them, and to the watch."""
    monkeypatch.setattr("netnslab.api.watches.MOST", 3)
    store = made()
    watch = watching(store)
    for number in range(5):
        put(store, f"p{number}")
    assert asyncio.run(watch.lines()) == b""
