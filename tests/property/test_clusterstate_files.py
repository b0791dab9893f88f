"""Following files gives what reading them afresh gives, whatever happened on the way."""

from __future__ import annotations

import json
import secrets
import select
import tempfile
import threading
from pathlib import Path
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from clusterstate.objects import KubernetesObject, ObjectRef
from clusterstate.snapshot import Name, Snapshot
from clusterstate.sources import files
from clusterstate.sources.files import FileSource, load_objects

NAMES = st.sampled_from(["web", "db"])
VALUES = st.sampled_from(["1", "2"])
PATHS = st.sampled_from(["a.json", "b.json", "sub/a.json", "sub/c.json"])
ADDRESSES = st.lists(st.sampled_from([{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}, {"ip": "fd00::1"}]), unique_by=str)


def namespace(name: str, value: str) -> dict:
    return {"kind": "Namespace", "metadata": {"name": name, "labels": {"v": value}}}


def service(name: str, value: str) -> dict:
    return {"kind": "Service", "metadata": {"name": name}, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": int(value)}]}}


def slice_(owner: str, value: str) -> dict:
    metadata = {"name": "slice", "labels": {"kubernetes.io/service-name": owner}}
    return {
        "kind": "EndpointSlice",
        "metadata": metadata,
        "addressType": "IPv4",
        "endpoints": [{"addresses": [f"10.0.0.{value}"]}],
    }


def endpoints(name: str, addresses: list) -> dict:
    return {"kind": "Endpoints", "metadata": {"name": name}, "subsets": [{"addresses": addresses}]}


OBJECTS = st.lists(
    st.builds(namespace, NAMES, VALUES)
    | st.builds(service, NAMES, VALUES)
    | st.builds(slice_, NAMES, VALUES)
    | st.builds(endpoints, NAMES, ADDRESSES),
    max_size=4,
)
STEPS = st.one_of(
    st.tuples(st.just("write"), PATHS, OBJECTS),
    st.tuples(st.just("rename over"), PATHS, OBJECTS),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("delete"), PATHS),
    st.tuples(st.just("turn"), st.sampled_from(["sub", "other"])),
    st.tuples(st.just("poll")),
)


def do(root: Path, step: tuple) -> None:
    """Take one step in the file system, where it is possible."""
    match step:
        case ("write", path, objects):
            (root / path).parent.mkdir(exist_ok=True)
            (root / path).write_text(json.dumps({"kind": "List", "items": objects}))
        case ("rename over", path, objects):
            (root / path).parent.mkdir(exist_ok=True)
            (root / ".new").write_text(json.dumps({"kind": "List", "items": objects}))
            (root / ".new").rename(root / path)
        case ("rename", old, new) if (root / old).exists() and (root / new).parent.exists():
            (root / old).rename(root / new)
        case ("delete", path):
            (root / path).unlink(missing_ok=True)
        case ("turn", name) if (root / "sub").exists() != (root / "other").exists() and (root / name).exists():
            (root / name).rename(root / ({"sub": "other", "other": "sub"}[name]))


def by_ref(snapshot: Snapshot) -> dict[ObjectRef, KubernetesObject]:
    return {one.ref: one for one in snapshot.objects()}


def services_of(snapshot: Snapshot) -> dict[Name, object]:
    names = {*snapshot.services, *snapshot.slices}
    return {name: (snapshot.services.get(name), snapshot.slices_of(name), snapshot.slices.get(name)) for name in names}


@settings(max_examples=200, deadline=None)
@given(st.lists(STEPS, max_size=12), st.lists(STEPS, max_size=12))
def test_following_equals_reading_afresh(before, after):
    """After any steps the followed snapshot and its errors are those of a fresh load, and each update names just what differs."""
    with tempfile.TemporaryDirectory() as name, patch.object(files, "SETTLE", 0.0):
        root = Path(name)
        for step in before:
            do(root, step)
        source = FileSource([root])
        try:
            update = source.load()
            snapshot, errors = update.snapshot, update.errors
            for step in (*after, ("poll",)):
                do(root, step)
                if step != ("poll",) or (update := source.poll()) is None:
                    continue
                old, new = by_ref(snapshot), by_ref(update.snapshot)
                assert update.changed == {ref for ref in old.keys() | new.keys() if old.get(ref) != new.get(ref)}
                was, now = services_of(snapshot), services_of(update.snapshot)
                assert update.service_changed == {n for n in {*was, *now} if was.get(n) != now.get(n)}
                assert all(new[ref] is one for ref, one in old.items() if new.get(ref) == one)
                snapshot, errors = update.snapshot, update.errors
            fresh, fresh_errors = load_objects([root])
            assert replace(snapshot, revision=1) == fresh
            assert errors == fresh_errors
        finally:
            source.close()


@settings(max_examples=50, deadline=None)
@given(OBJECTS, OBJECTS, st.data())
def test_bad_input_takes_nothing_away(first, second, data):
    """However a file is cut short, every object that was good stays; once it is whole again there is no trace."""
    with tempfile.TemporaryDirectory() as name, patch.object(files, "SETTLE", 0.0):
        root = Path(name)
        texts = {path: json.dumps({"kind": "List", "items": items}) for path, items in (("a.json", first), ("b.json", second))}
        for path, text in texts.items():
            (root / path).write_text(text)
        source = FileSource([root])
        try:
            loaded = source.load()
            (root / "a.json").write_text(texts["a.json"][: data.draw(st.integers(0, len(texts["a.json"]) - 1))])
            broken = source.poll()
            assert broken is not None
            assert replace(broken.snapshot, revision=1) == loaded.snapshot
            assert any(e.source == str(root / "a.json") and e.ref is None for e in broken.errors)
            (root / "a.json").write_text(texts["a.json"])
            mended = source.poll()
            assert mended is not None
            assert (replace(mended.snapshot, revision=1), mended.errors) == (loaded.snapshot, loaded.errors)
        finally:
            source.close()


def test_a_generation_is_never_ahead_of_its_objects(tmp_path):
    """While a writer works on, every echoed generation comes with at least the state it was written for."""
    rounds, names = 60, [f"n{i}" for i in range(5)]
    for name in names:
        (tmp_path / f"{name}.json").write_text(json.dumps(namespace(name, "0")))

    def work() -> None:
        for number in range(1, rounds + 1):
            for name in names:
                fresh = tmp_path / f".{secrets.token_hex(4)}"
                target = fresh if number % 2 else tmp_path / f"{name}.json"
                target.write_text(json.dumps(namespace(name, str(number))))
                if number % 2:
                    fresh.rename(tmp_path / f"{name}.json")
            (tmp_path / ".generation").write_text(str(number))

    source = FileSource([tmp_path])
    try:
        assert source.load().errors == ()
        writer = threading.Thread(target=work)
        writer.start()
        echoed, errors = "", ()
        while echoed != str(rounds) and select.select([source], [], [], 10)[0]:
            update = source.poll()
            if update is None:
                continue
            errors, echoed = update.errors, update.generation  # a file that is being written in place may be half there
            states = {int(update.snapshot.namespaces[name].labels["v"]) for name in names}
            assert min(states) >= int(echoed or 0)
        writer.join(timeout=120)
        assert (echoed, errors) == (str(rounds), ())
    finally:
        source.close()
