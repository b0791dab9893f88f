"""Objects from an API server: all before the first snapshot, each change after it, and nothing lost by whatever goes wrong."""

from __future__ import annotations

import json
import random
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import pytest
from fake_api import SERVICES, SLICES, FakeApi, node, service
from patience import Patience

from clusterstate.snapshot import Snapshot
from clusterstate.sources import reflector
from clusterstate.sources.kubeapi import KubeSource, resources, version_of
from clusterstate.sources.reflector import ApiError, Resource

WANTED = (Resource("Service", SERVICES),)
SECONDS = 5.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attempts follow one another quickly."""
    monkeypatch.setattr(reflector, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(reflector, "LONGEST_WAIT", 0.05)


@contextmanager
def following(api: FakeApi, wanted: tuple[Resource, ...] = WANTED) -> Iterator[KubeSource]:
    """Follow a server; its connections end with the test."""
    source = KubeSource(api, wanted)
    try:
        yield source
    finally:
        source.close()
        api.away("the test is over")


def until(source: KubeSource, wanted: Callable[[Snapshot], bool]) -> Snapshot:
    """Poll until the snapshot is as wanted, and return it."""
    limit = Patience(SECONDS)
    last = None
    while not limit.over:
        select.select([source], [], [], 0.2)
        update = source.poll()
        if update is not None:
            last = update
            if wanted(update.snapshot):
                return update.snapshot
    raise AssertionError(f"not as wanted after {SECONDS} s: {last}")


def names(snapshot: Snapshot) -> set[str]:
    return {name for _, name in snapshot.services}


@pytest.mark.parametrize("minor", [30, 33])
def test_everything_then_changes(minor):
    """The first snapshot has all, whether listed in pages or streamed; what is added, changed and deleted comes as such."""
    api = FakeApi(minor)
    for number in range(1203):
        api.put(SERVICES, service(f"s{number}", f"10.96.{number // 250}.{number % 250 + 1}"))
    with following(api) as source:
        first = source.load(SECONDS)
        assert (len(first.snapshot.services), first.changed, first.errors) == (1203, None, ())
        streamed = any("sendInitialEvents" in parameters for _, parameters in api.asked)
        assert streamed == (minor >= 32)
        assert sum("continue" in parameters for _, parameters in api.asked) == (0 if streamed else 2)
        api.put(SERVICES, service("new", "10.96.9.9"))
        assert ("ns", "new") in until(source, lambda s: ("ns", "new") in s.services).services
        api.put(SERVICES, service("new", "10.96.9.10"))
        until(source, lambda s: str(s.services["ns", "new"].cluster_ips[0]) == "10.96.9.10")
        api.delete(SERVICES, "ns/new")
        until(source, lambda s: ("ns", "new") not in s.services)


def test_a_server_without_streams_is_listed():
    """A server of a new version that refuses to stream a list is asked for the list itself."""
    api = FakeApi(33)
    api.put(SERVICES, service("a", "10.96.0.1"))
    with following(api) as source:
        api.minor = 30  # says no when asked
        api.get = lambda path, parameters=reflector.NO_PARAMETERS, get=api.get: (
            b'{"major":"1","minor":"33"}' if path == "/version" else get(path, parameters)
        )
        assert names(source.load(SECONDS).snapshot) == {"a"}


def test_nothing_goes_while_the_server_is_away():
    """A server that is away takes nothing down; the error says so and goes when it is back, with what happened meanwhile."""
    api = FakeApi()
    api.put(SERVICES, service("a", "10.96.0.1"))
    with following(api) as source:
        source.load(SECONDS)
        api.away("connection refused")
        limit = Patience(SECONDS)
        while not (update := source.poll()) and not limit.over:
            select.select([source], [], [], 0.1)
        assert update is not None
        assert names(update.snapshot) == {"a"}
        assert [str(error) for error in update.errors] == ["/api/v1/services: connection refused (what is known of it stays)"]
        api.put(SERVICES, service("b", "10.96.0.2"))
        api.back()
        until(source, lambda s: names(s) == {"a", "b"})
        while source._errors():
            assert not limit.over
            source.poll()


def test_forgotten_history_is_listed_again():
    """After 410 everything is listed again: what was deleted meanwhile goes, the rest stays the same objects."""
    api = FakeApi()
    for name, ip in (("a", "10.96.0.1"), ("b", "10.96.0.2")):
        api.put(SERVICES, service(name, ip))
    with following(api) as source:
        before = source.load(SECONDS).snapshot
        api.away()
        api.delete(SERVICES, "ns/b")
        api.put(SERVICES, service("c", "10.96.0.3"))
        api.compact()
        api.back()
        after = until(source, lambda s: names(s) == {"a", "c"})
        assert after.services["ns", "a"] is before.services["ns", "a"]


def test_events_of_the_past_change_nothing():
    """An event that comes again or too late is passed over: no object comes back, no old version returns, not even for a moment."""
    api = FakeApi()
    with following(api) as source:
        source.load(SECONDS)
        api.put(SERVICES, service("a", "10.96.0.1"))
        api.put(SERVICES, service("b", "10.96.0.2"))
        api.put(SERVICES, service("a", "10.96.0.3"))
        api.delete(SERVICES, "ns/b")
        newest = ip_address("10.96.0.3")
        until(source, lambda s: names(s) == {"a"} and s.services["ns", "a"].cluster_ips == (newest,))
        seen = []
        for number in (0, 1):  # the first versions of both
            api.repeat(SERVICES, number)
        api.put(SERVICES, service("last", "10.96.0.9"))

        def is_last(snapshot: Snapshot) -> bool:
            seen.append((names(snapshot) - {"last"}, snapshot.services["ns", "a"].cluster_ips))
            return "last" in names(snapshot)

        until(source, is_last)
        assert seen == [({"a"}, (newest,))] * len(seen)


def test_a_backup_is_taken_for_what_it_is():
    """A server restored from a backup has older versions: its state counts all the same."""
    api = FakeApi()
    api.put(SERVICES, service("a", "10.96.0.1"))
    backup, version = {path: dict(held) for path, held in api.objects.items()}, api.version
    api.put(SERVICES, service("b", "10.96.0.2"))
    with following(api) as source:
        source.load(SECONDS)
        api.restore(backup, version)
        until(source, lambda s: names(s) == {"a"})
        api.put(SERVICES, service("c", "10.96.0.3"))
        until(source, lambda s: names(s) == {"a", "c"})


RUBBISH = {
    "no JSON": "{]",
    "half an object": '{"type":"ADDED","object":{"kind":"Service","metadata":{"name":"x"',
    "an unknown type": '{"type":"EXPLODED","object":{}}',
    "no object": '{"type":"ADDED"}',
    "something else": "[]",
    "an error without a code": '{"type":"ERROR","object":{"kind":"Status","message":"etcdserver: no leader"}}',
}


@pytest.mark.parametrize("line", RUBBISH.values(), ids=list(RUBBISH))
def test_rubbish_takes_nothing_away(line):
    """Whatever a watch says that cannot be read, what is known stays and later changes come through."""
    api = FakeApi()
    api.put(SERVICES, service("a", "10.96.0.1"))
    with following(api) as source:
        source.load(SECONDS)
        api.say(SERVICES, line)
        api.put(SERVICES, service("b", "10.96.0.2"))
        seen = until(source, lambda s: "b" in names(s))
        assert names(seen) == {"a", "b"}


def test_a_bad_object_keeps_its_last_good_version():
    """An object that can no longer be read is named in an error, and what was known of it stays."""
    api = FakeApi()
    api.put(SERVICES, service("a", "10.96.0.1"))
    with following(api) as source:
        source.load(SECONDS)
        api.put(SERVICES, {"metadata": {"namespace": "ns", "name": "a"}, "spec": {"ports": [{"port": 99999}]}})
        limit = Patience(SECONDS)
        while not (update := source.poll()) and not limit.over:
            select.select([source], [], [], 0.1)
        assert update is not None
        assert names(update.snapshot) == {"a"}
        (error,) = update.errors
        assert str(error).startswith("/api/v1/namespaces/ns/services/a: Service ns/a: spec.ports[0].port: ")


def test_kinds_that_are_not_served():
    """An optional kind that the server does not have is taken for empty; any other is waited for, and the wait says for what."""
    of_cluster = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies"
    api = FakeApi(absent=("/apis/networking.k8s.io/v1/servicecidrs", of_cluster))
    api.put("/api/v1/nodes", node("n1"))
    with following(api, resources("n1", services=True, all_nodes=False, policies=True)) as source:
        assert set(source.load(SECONDS).snapshot.nodes) == {"n1"}
        assert ("/api/v1/nodes", "metadata.name=n1") in {(p, q.get("fieldSelector")) for p, q in api.asked}
    api = FakeApi(absent=(SERVICES,))
    with following(api) as source, pytest.raises(ApiError, match=r"no complete list of Service after 0\.3 s: 404 the server"):
        source.load(0.3)


def test_a_kind_that_is_served_no_more_stays():
    """An optional kind that answers 404 after it was listed keeps what is known of it, and an error says so."""
    path = "/apis/networking.k8s.io/v1/servicecidrs"
    api = FakeApi()
    api.put(path, {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}})
    with following(api, (Resource("ServiceCIDR", path, optional=True),)) as source:
        assert set(source.load(SECONDS).snapshot.service_cidrs) == {"kubernetes"}
        api.absent = (path,)
        api.cut()
        limit = Patience(SECONDS)
        while not (update := source.poll()) and not limit.over:
            select.select([source], [], [], 0.1)
        assert update is not None
        assert set(update.snapshot.service_cidrs) == {"kubernetes"}
        assert "404" in str(update.errors[0])


def test_a_fault_of_ours_is_told_and_tried_again(caplog):
    """An exception that nobody thought of ends no following: it is in the log and among the errors, and the next attempt follows."""
    api = FakeApi()
    api.put(SERVICES, service("a", "10.96.0.1"))
    real, faults = api.lines, iter([True, True])

    def lines(path, parameters):
        if next(faults, False):
            raise ZeroDivisionError("a fault")
        return real(path, parameters)

    api.lines = lines
    with following(api) as source:
        source.load(SECONDS)
        api.put(SERVICES, service("b", "10.96.0.2"))
        until(source, lambda s: names(s) == {"a", "b"})
    assert "ZeroDivisionError: a fault" in caplog.text


def test_history_that_is_always_forgotten_is_asked_for_less_and_less(monkeypatch):
    """After each 410 in a row the wait before the next list may be longer, up to the longest; an event ends the row."""
    monkeypatch.setattr(random, "uniform", lambda _least, most: most)
    api = FakeApi()
    one = reflector.Reflector(api, WANTED[0], lambda _news: None, threading.Event())
    one._list()
    assert [round(one._failed(ApiError(410, "gone")), 3) for _ in range(5)] == [0.01, 0.02, 0.04, 0.05, 0.05]
    one._list()
    gone = b'{"type":"ERROR","object":{"code":410}}'
    monkeypatch.setattr(api, "lines", lambda _path, _parameters: iter([api.bookmark(SERVICES, {}).encode(), gone]))
    with pytest.raises(ApiError):
        one._watch()
    assert one._failed(ApiError(410, "gone")) == pytest.approx(0.01)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_it_ends_as_the_server_is(seed):
    """Random changes among cuts, absences, 410s, repeated and reordered events: it converges, and what never changed never goes."""
    dice = random.Random(seed)
    api = FakeApi(dice.choice([30, 33]))
    stable = {f"k{number}" for number in range(5)}
    for number in range(5):
        api.put(SERVICES, service(f"k{number}", f"10.96.1.{number + 1}"))
    with following(api) as source:
        source.load(SECONDS)
        for step in range(120):
            match dice.randrange(12):
                case 0:
                    api.cut()
                case 1:
                    api.away()
                case 2:
                    api.compact()
                case 3 | 4:
                    api.repeat(SERVICES, dice.randrange(1000))
                case 5:
                    api.say(SERVICES, dice.choice([*RUBBISH.values(), api.bookmark(SERVICES, {})]))
                case 6 | 7 if len(api.objects[SERVICES]) > len(stable):
                    key = dice.choice([k for k in sorted(api.objects[SERVICES]) if k.removeprefix("ns/") not in stable])
                    api.delete(SERVICES, key)
                case _:
                    number = dice.randrange(8)
                    api.put(SERVICES, service(f"s{number}", f"10.96.2.{number + 1}", step=str(step)))
            if dice.random() < 0.3:
                api.back()
            if dice.random() < 0.2 and (update := source.poll()):
                assert names(update.snapshot) >= stable
        api.back()
        wanted = {key.removeprefix("ns/") for key in api.objects[SERVICES]}
        api.put(SERVICES, service("last", "10.96.3.1"))
        assert names(until(source, lambda s: names(s) == wanted | {"last"})) >= stable


def test_an_update_says_up_to_which_version_all_kinds_are_known():
    """The generation is the least version of all kinds: a change alone does not move it, a bookmark of the other kind then does."""
    api = FakeApi(33)
    api.put(SERVICES, service("a", "10.96.0.1"))
    with following(api, (*WANTED, Resource("EndpointSlice", SLICES))) as source:
        first = source.load(SECONDS)
        assert first.generation == str(api.version)
        api.put(SERVICES, service("b", "10.96.0.2"))
        generations = []

        def told(wanted):
            limit = Patience(SECONDS)
            while wanted not in generations and not limit.over:
                api.say(SLICES, api.bookmark(SLICES, {}))  # again and again: it may not watch yet
                select.select([source], [], [], 0.2)
                update = source.poll()
                if update is not None:
                    generations.append(update.generation)

        until(source, lambda s: ("ns", "b") in s.services)
        told(str(api.version))
        assert generations == [str(api.version)]


def test_versions():
    """The server's version is read as servers write it; anything else is taken for an old one."""
    assert version_of(json.dumps({"major": "1", "minor": "33+"}).encode()) == (1, 33)
    assert version_of(b"nonsense") == version_of(b"{}") == (0, 0)
