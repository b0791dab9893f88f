"""What an API server said is kept over a reboot, used until it has said everything again, and then forgotten."""

from __future__ import annotations

import argparse
import gzip
import json
import select
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from fake_api import SERVICES, SLICES, FakeApi, node, service
from patience import Patience, eventually

from clusterstate.sources import reflector
from nodeplane import kept_objects, kept_source
from nodeplane.cluster_source import ClusterSource, open_source
from nodeplane.config import parse_config
from nodeplane.kept_objects import ForeignStateError, Identity, read_objects, write_objects

CONFIG = parse_config({"kind": "KubeProxyConfiguration", "hostnameOverride": "n1"})
POLICY = parse_config(
    {"apiVersion": "nodeplane.dev/v1alpha1", "kind": "NodeConfiguration", "nodeName": "n1", "policy": {"enabled": True}}
)
SECONDS = 5.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let attempts and writes follow one another quickly, and keep what is kept in the test's own directory."""
    monkeypatch.setattr(reflector, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(reflector, "LONGEST_WAIT", 0.05)
    monkeypatch.setattr(kept_source, "EVERY", 0.01)
    monkeypatch.setattr(kept_source, "SAME_BOOT", 0.2)
    monkeypatch.setattr(kept_source, "AFTER_BOOT", 0.05)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where the state is kept."""
    path = tmp_path / "objects.json.gz"
    monkeypatch.setattr(kept_source, "OBJECTS_FILE", path)
    return path


def cluster(*services: str) -> FakeApi:
    """Return a server with node n1 and these Services, each with a slice."""
    api = FakeApi()
    api.server = "https://api.test"
    api.put("/api/v1/nodes", node("n1"))
    for number, name in enumerate(services, 1):
        api.put(SERVICES, service(name, f"10.96.0.{number}"))
        metadata = {"namespace": "ns", "name": f"{name}-1", "labels": {"kubernetes.io/service-name": name}}
        api.put(SLICES, {"metadata": metadata, "addressType": "IPv4", "endpoints": [{"addresses": ["10.1.0.1"]}]})
    return api


@contextmanager
def agent_of(api: FakeApi, monkeypatch: pytest.MonkeyPatch, config=CONFIG) -> Iterator[ClusterSource]:
    """Return the source that an agent of n1 would have of this server."""
    monkeypatch.setattr("clusterstate.sources.kubeclient.KubeClient", lambda _file, **_flags: api)
    with closing(open_source(argparse.Namespace(objects=None, kubeconfig=Path("x")), config)) as source:
        yield source
    api.away("the test is over")


def follow(source: ClusterSource, condition) -> None:
    """Poll until an update is as wanted."""
    limit = Patience(SECONDS)
    while not limit.over:
        select.select([source.fileno()], [], [], 0.05)
        update = source.poll()
        if update is not None and condition(update):
            return
    raise AssertionError("no such update")


def names(snapshot) -> set[str]:
    return {name for _, name in snapshot.services}


def wait_for_file(path: Path, *services: str, config=CONFIG) -> None:
    """Wait until these Services, and no others, are kept."""

    def is_kept() -> bool:
        return path.exists() and {i["metadata"]["name"] for i in items(path) if i["kind"] == "Service"} == set(services)

    eventually(is_kept, SECONDS, "not written")


def items(path: Path) -> list[dict]:
    return json.loads(gzip.decompress(path.read_bytes()))["items"]


def test_server_away_at_start(monkeypatch, file):
    """With the server away a start goes by the file, and says so; slices and Nodes are there as well."""
    with agent_of(cluster("a", "b"), monkeypatch) as source:
        before = source.load().snapshot
        wait_for_file(file, "a", "b")
    api = cluster()
    api.away()
    with agent_of(api, monkeypatch) as source:
        update = source.load()
        assert str(file) in update.kept
        assert update.snapshot.objects() == before.objects()
        api.away("no route to host")
        follow(source, lambda u: "no route to host" in u.kept and u.changed == frozenset())


def test_nothing_rises_from_the_file(monkeypatch, file):
    """Once the server has said everything, what it does not have is gone, however long it was kept; everything may differ."""
    with agent_of(cluster("a", "gone"), monkeypatch) as source:
        source.load()
        wait_for_file(file, "a", "gone")
    api = cluster("a", "new")
    api.away()
    with agent_of(api, monkeypatch) as source:
        assert names(source.load().snapshot) == {"a", "gone"}
        api.back()
        follow(source, lambda u: (names(u.snapshot), u.changed, u.service_changed, u.kept) == ({"a", "new"}, None, None, ""))
        wait_for_file(file, "a", "new")
        api.put(SERVICES, service("later", "10.96.0.9"))
        follow(source, lambda u: names(u.snapshot) == {"a", "new", "later"})
        wait_for_file(file, "a", "new", "later")


def test_a_server_that_stops_half_way_removes_nothing(monkeypatch, file):
    """With some lists in and others not, everything stays as it was kept."""
    with agent_of(cluster("a"), monkeypatch) as source:
        source.load()
        wait_for_file(file, "a")
    api = cluster()
    api.get = _without_slices(api.get)
    with agent_of(api, monkeypatch) as source:
        update = source.load()
        assert names(update.snapshot) == {"a"}
        api.put(SERVICES, service("b", "10.96.0.2"))
        api.put("/api/v1/nodes", node("n1"))
        eventually(lambda: "no complete list of EndpointSlice:" in source.server.why(), SECONDS)
        said = [update for update in (source.poll() for _ in range(20)) if update is not None]
        assert all(u.snapshot == update.snapshot and u.kept for u in said)


def _without_slices(get):
    def answer(path, parameters=reflector.NO_PARAMETERS):
        if path == SLICES:
            raise reflector.ApiError(500, "etcdserver: no leader")
        return get(path, parameters)

    return answer


def test_server_in_time(monkeypatch, file):
    """A server that answers is believed, and the file never looked into."""
    write_objects(cluster_snapshot("old"), _identity(), 1.0, file)
    with agent_of(cluster("a"), monkeypatch) as source:
        update = source.load()
    assert (names(update.snapshot), update.kept) == ({"a"}, "")


def cluster_snapshot(*services: str):
    from clusterstate.parse import parse_object  # noqa: PLC0415
    from clusterstate.snapshot import Snapshot, edited  # noqa: PLC0415

    found = [parse_object({"kind": "Service", **service(name, f"10.96.0.{i}")}, "x") for i, name in enumerate(services, 1)]
    return edited(Snapshot(), (), [one for parsed in found for one in parsed.objects])


def _identity(**changes) -> Identity:
    from msgspec.structs import replace  # noqa: PLC0415

    return replace(Identity("n1", "https://api.test", ("/api/v1/services",)), **changes)


@pytest.mark.parametrize("cut", [0, 1, 40, 0.5, -1])
def test_a_file_that_is_not_whole(file, cut):
    """A file cut short anywhere is refused as a whole."""
    write_objects(cluster_snapshot("a", "b"), _identity(), 1.0, file)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * cut) if isinstance(cut, float) else cut])
    with pytest.raises(ForeignStateError, match=str(file)):
        read_objects(_identity(), file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not gzip", "cannot be read whole"),
        (gzip.compress(b"\xff\xfe"), "is not what an agent writes"),
        (gzip.compress(b"[1]"), "is not what an agent writes"),
        (gzip.compress(b'{"kind":"List","items":[]}'), "its format is ''"),
        (gzip.compress(b'{"kind":"List","metadata":{"format":"nodeplane objects 99"},"items":[]}'), "objects 99"),
    ],
    ids=["text", "bytes", "list", "no-format", "other-format"],  # gzip puts the time into the bytes of which pytest makes names
)
def test_a_file_of_somebody_else(file, content, words):
    """A file that no agent of this version wrote is refused, and the reason said."""
    file.write_bytes(content)
    with pytest.raises(ForeignStateError, match=words):
        read_objects(_identity(), file)


def test_a_changed_byte(file):
    """One byte that the disk changed is noticed wherever it is."""
    write_objects(cluster_snapshot("a", "b"), _identity(), 1.0, file)
    data = file.read_bytes()
    for place in range(10, len(data), 7):
        file.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        with pytest.raises(ForeignStateError):
            read_objects(_identity(), file)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (_identity(node="n2"), "its node is 'n1', not 'n2'"),
        (_identity(server="https://other"), "its server is 'https://api.test'"),
        (_identity(resources=("/api/v1/pods", "/api/v1/services")), "written without /api/v1/pods"),
    ],
)
def test_another_node_cluster_or_question(file, wanted, words):
    """Another node's or cluster's objects are refused, and those among which a kind is missing that is needed now."""
    write_objects(cluster_snapshot("a"), _identity(), 1.0, file)
    with pytest.raises(ForeignStateError, match=words):
        read_objects(wanted, file)


def test_policies_are_never_taken_from_a_file_without_pods(monkeypatch, file, caplog):
    """Where policies are enforced from now on, a file without pods is refused: the agent waits for the server instead."""
    with agent_of(cluster("a"), monkeypatch) as source:
        source.load()
        wait_for_file(file, "a")
    api = cluster("b")
    api.away()
    back = threading.Timer(0.2, api.back)
    back.start()
    with agent_of(api, monkeypatch, POLICY) as source:
        assert names(source.load().snapshot) == {"b"}
    back.join()
    assert "was written without /api/v1/pods" in caplog.text


def test_a_full_disk(monkeypatch, file, caplog):
    """What cannot be written is said once, and written when it can be."""
    file.mkdir()
    api = cluster("a")
    with agent_of(api, monkeypatch) as source:
        source.load()
        eventually(lambda: "cannot be kept" in caplog.text, SECONDS)
        file.rmdir()
        api.put(SERVICES, service("b", "10.96.0.2"))
        follow(source, lambda u: names(u.snapshot) == {"a", "b"})
        wait_for_file(file, "a", "b")
    assert caplog.text.count("cannot be kept") == 1


def test_an_end_loses_nothing(monkeypatch, file):
    """What changed just before the end is written down by it, however long the pause between two writes."""
    monkeypatch.setattr(kept_source, "EVERY", 60.0)
    api = cluster("a")
    with agent_of(api, monkeypatch) as source:
        source.load()
        wait_for_file(file, "a")
        api.put(SERVICES, service("b", "10.96.0.2"))
        follow(source, lambda u: names(u.snapshot) == {"a", "b"})
    assert {i["metadata"]["name"] for i in items(file) if i["kind"] == "Service"} == {"a", "b"}


def test_same_boot(file, monkeypatch):
    """A file tells whether the machine was started since it was written."""
    write_objects(cluster_snapshot("a"), _identity(), 7.0, file)
    kept = read_objects(_identity(), file)
    assert (kept.same_boot, kept.written) == (True, 7.0)
    monkeypatch.setattr(kept_objects, "boot_id", lambda: "another")
    assert not read_objects(_identity(), file).same_boot
