"""The file source: what each change of files does to the snapshot."""

from __future__ import annotations

import select
from pathlib import Path

import pytest
from immutables import Map
from object_files import following, namespace, namespaces, ref, replace, service, slice_, told, write

from clusterstate.objects import ObjectRef
from clusterstate.sources import files


@pytest.fixture
def objects(tmp_path):
    directory = tmp_path / "objects"
    directory.mkdir()
    return directory


@pytest.fixture
def follow():
    with following() as start:
        yield start


def test_the_first_read_is_complete(objects, follow):
    """Load reads every .json, .yaml and .yml file, subdirectories included, and nothing else."""
    write(objects / "a.json", namespace("a"))
    (objects / "b.yaml").write_text("kind: Namespace\nmetadata: {name: b}\n")
    (objects / "sub" / "deep").mkdir(parents=True)
    write(objects / "sub" / "deep" / "c.yml", namespace("c"))
    for name in (".hidden.yaml", "x.yaml~", ".#x.yaml", "#x.yaml#", "x.yaml.tmp", ".x.yaml.swp", "README.md"):
        write(objects / name, namespace("never"))
    (objects / ".git").mkdir()
    write(objects / ".git" / "d.yaml", namespace("never"))
    source, update = follow(objects)
    assert namespaces(update) == ["a", "b", "c"]
    assert (update.changed, update.service_changed, update.errors, update.generation) == (None, None, (), "")
    assert update.snapshot.revision == 1
    assert source.poll() is None


def test_a_change_is_announced_and_exact(objects, follow):
    """The descriptor becomes readable; the update names exactly what differs and shares all the rest."""
    write(objects / "all.json", service("web"), service("other"), slice_("web-1", "web", "10.0.0.1"))
    source, before = follow(objects)
    assert select.select([source], [], [], 0)[0] == []
    write(objects / "all.json", service("web"), service("other"), slice_("web-1", "web", "10.0.0.1", "10.0.0.2"))
    assert select.select([source], [], [], 5)[0] == [source]
    update = source.poll()
    assert update is not None
    assert update.changed == {ref("EndpointSlice", "web-1")}
    assert update.service_changed == {("default", "web")}
    assert len(update.snapshot.slices_of(("default", "web"))[0].endpoints) == 2
    assert update.snapshot.services[("default", "web")] is before.snapshot.services[("default", "web")]
    assert len(before.snapshot.slices_of(("default", "web"))[0].endpoints) == 1
    assert update.snapshot.revision == 2
    assert source.poll() is None


def test_rewriting_the_same_is_no_change(objects, follow):
    """A file written anew with equal objects, in other words even, yields no update."""
    write(objects / "a.json", namespace("a", x="1"))
    source, _ = follow(objects)
    (objects / "a.json").write_text('{"metadata": {"labels": {"x": "1"}, "name": "a"}, "kind": "Namespace", "other": 1}')
    assert source.poll() is None


def test_create_rename_over_and_delete(objects, follow):
    """Files that come, are renamed over or go bring, change and take their objects."""
    source, update = follow(objects)
    assert namespaces(update) == []
    write(objects / "a.json", namespace("a"))
    assert namespaces(source.poll()) == ["a"]
    replace(objects / "a.json", namespace("a", x="1"), namespace("b"))
    update = source.poll()
    assert update.changed == {ref("Namespace", "a"), ref("Namespace", "b")}
    assert update.snapshot.namespaces["a"].labels["x"] == "1"
    (objects / "a.json").rename(objects / "z.json")
    assert source.poll() is None
    (objects / "z.json").rename(objects / "z.txt")
    assert namespaces(source.poll()) == []
    (objects / "link.json").symlink_to(objects / "z.txt")
    assert namespaces(source.poll()) == ["a", "b"]
    (objects / "link.json").unlink()
    update = source.poll()
    assert (namespaces(update), update.changed) == ([], {ref("Namespace", "a"), ref("Namespace", "b")})


def test_a_slice_that_moves_changes_both_services(objects, follow):
    """A slice given to another Service leaves the first, and both are to be compiled again."""
    write(objects / "s.json", slice_("s", "web", "10.0.0.1"))
    source, _ = follow(objects)
    write(objects / "s.json", slice_("s", "db", "10.0.0.1"))
    update = source.poll()
    assert update.service_changed == {("default", "web"), ("default", "db")}
    assert list(update.snapshot.slices) == [("default", "db")]


def test_endpoints_follow_like_slices(objects, follow):
    """The slices mirrored from an Endpoints object come, change and go with it."""
    endpoints = {
        "kind": "Endpoints",
        "metadata": {"name": "db"},
        "subsets": [{"addresses": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}],
    }
    write(objects / "e.json", endpoints)
    source, update = follow(objects)
    assert {s.family for s in update.snapshot.slices_of(("default", "db"))} == {4, 6}
    write(objects / "e.json", {**endpoints, "subsets": [{"addresses": [{"ip": "10.0.0.1"}]}]})
    update = source.poll()
    assert update.changed == {ObjectRef("Endpoints", "default", "db/ipv6")}
    write(objects / "e.json", {**endpoints, "subsets": []})
    assert source.poll().snapshot.slices == Map()


def test_a_file_being_written_is_not_read(objects, follow):
    """Until its writer closes it, a file counts as it was."""
    write(objects / "a.json", namespace("a"), namespace("b"))
    source, _ = follow(objects)
    with (objects / "a.json").open("w") as file:
        file.write('{"kind": "Namespace",')
        file.flush()
        assert source.poll() is None
        write(objects / "c.json", namespace("c"))
        assert namespaces(source.poll()) == ["a", "b", "c"]
        file.write('"metadata": {"name": "a"}}')
    update = source.poll()
    assert (namespaces(update), update.errors) == (["a", "c"], ())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"kind": "Namespace", "meta', "is not JSON: Input data was truncated"),
        ("", "is empty: perhaps not yet written"),
        ('{"metadata": {"name": "a"}}', 'kind: must be the kind of an object, is ""'),
    ],
)
def test_a_file_that_turns_unreadable_keeps_its_objects(objects, follow, text, reason):
    """A broken file stands as an error, and its last good objects stay until it is mended."""
    write(objects / "a.json", namespace("a"))
    write(objects / "b.json", namespace("b"))
    source, before = follow(objects)
    (objects / "a.json").write_text(text)
    update = source.poll()
    assert told(update) == [f"{objects}/a.json: {reason}"]
    assert (update.changed, update.service_changed) == (frozenset(), frozenset())
    assert update.snapshot.namespaces == before.snapshot.namespaces
    write(objects / "b.json", namespace("b", x="1"))
    assert told(source.poll()) == [f"{objects}/a.json: {reason}"]
    write(objects / "a.json", namespace("c"))
    update = source.poll()
    assert (namespaces(update), update.errors) == (["b", "c"], ())


def test_an_object_that_turns_bad_keeps_its_last_good_version(objects, follow):
    """One bad object of a file keeps its last good version while the others of the file follow."""
    write(objects / "a.json", service("web", port=80), service("db", port=1))
    source, _ = follow(objects)
    write(objects / "a.json", service("web", port=70000), service("db", port=2), service("new", port=0))
    update = source.poll()
    web, db = (update.snapshot.services[("default", name)].ports[0].port for name in ("web", "db"))
    assert (web, db, update.changed) == (80, 2, {ref("Service", "db")})
    port = "spec.ports[0].port: must be between 1 and 65535, is"
    assert told(update) == [
        f"{objects}/a.json: Service default/new: {port} 0",
        f"{objects}/a.json: Service default/web: {port} 70000 (its last good version stays)",
    ]
    write(objects / "a.json", service("db", port=2))
    update = source.poll()
    assert (list(update.snapshot.services), update.errors) == ([("default", "db")], ())


def test_the_first_of_two_namesakes_counts(objects, follow):
    """The same object in two files is an error of the later path, which takes over when the first one goes."""
    write(objects / "b.json", namespace("n", of="b"))
    write(objects / "c.json", namespace("n", of="c"))
    source, update = follow(objects)
    also = f"{objects}/c.json: Namespace n: is also in {objects}/b.json, which counts"
    assert (update.snapshot.namespaces["n"].labels["of"], told(update)) == ("b", [also])
    write(objects / "c.json", namespace("n", of="C"))
    assert source.poll() is None
    write(objects / "a.json", namespace("n", of="a"))
    update = source.poll()
    assert update.snapshot.namespaces["n"].labels["of"] == "a"
    assert told(update) == [f"{objects}/{n}.json: Namespace n: is also in {objects}/a.json, which counts" for n in "bc"]
    (objects / "a.json").unlink()
    (objects / "b.json").unlink()
    update = source.poll()
    assert (update.snapshot.namespaces["n"].labels["of"], update.errors) == ("C", ())
    (objects / "c.json").unlink()
    assert namespaces(source.poll()) == []


def test_the_same_object_twice_in_one_file(objects, follow):
    """Within a file the first of two namesakes counts."""
    write(objects / "a.json", namespace("n", x="1"), namespace("n", x="2"))
    _, update = follow(objects)
    assert update.snapshot.namespaces["n"].labels["x"] == "1"
    assert told(update) == [f"{objects}/a.json: Namespace n: is here twice: the first one counts"]


def test_a_generation_is_echoed_with_all_that_preceded_it(objects, follow):
    """A writer's number comes with the state it was written for, also where nothing else has changed."""
    (objects / ".generation").write_text("7\n")
    source, update = follow(objects)
    assert update.generation == "7"
    write(objects / "a.json", namespace("a"))
    (objects / ".generation").write_text("8\n")
    update = source.poll()
    assert (update.generation, namespaces(update)) == ("8", ["a"])
    (objects / ".new").write_text("9")
    (objects / ".new").rename(objects / ".generation")
    update = source.poll()
    assert (update.generation, update.changed, update.service_changed) == ("9", frozenset(), frozenset())
    write(objects / "a.json", namespace("a", x="1"))
    assert source.poll().generation == "9"
    (objects / ".generation").unlink()
    assert source.poll().generation == ""


def test_a_generation_written_during_the_first_read_is_news(objects, follow, monkeypatch):
    """What is written after ``.generation`` was read, and before the directory is listed, is found by the next poll."""
    (objects / ".generation").write_text("7\n")
    read = files.FileSource._read_generation

    def then_write(source, root):
        read(source, root)
        monkeypatch.setattr(files.FileSource, "_read_generation", read)
        (objects / ".new").write_text("8\n")
        (objects / ".new").rename(objects / ".generation")

    monkeypatch.setattr(files.FileSource, "_read_generation", then_write)
    source, update = follow(objects)
    assert update.generation == "7"
    assert source.poll().generation == "8"


def test_a_generation_ends_the_wait_after_deletions(objects, follow, monkeypatch):
    """A writer that deletes a file and says so is not waited for."""
    write(objects / "a.json", namespace("a"))
    source, _ = follow(objects)
    monkeypatch.setattr(files, "SETTLE", 3600.0)
    monkeypatch.setattr(files, "LONGEST_SETTLE", 3600.0)
    (objects / "a.json").unlink()
    (objects / ".generation").write_text("2")
    update = source.poll()
    assert (namespaces(update), update.generation) == ([], "2")


def test_two_directories_each_have_their_generation(tmp_path, follow):
    """Of several given directories the generations are joined in the order of the paths."""
    for name, number in (("a", "1"), ("b", "2"), ("c", "")):
        (tmp_path / name).mkdir()
        if number:
            (tmp_path / name / ".generation").write_text(number)
    _, update = follow(tmp_path / "b", tmp_path / "c", tmp_path / "a")
    assert update.generation == "2,1"


def test_a_burst_is_one_update(objects, follow):
    """Everything that happened since the last poll comes as one snapshot."""
    source, _ = follow(objects)
    for i in range(300):
        write(objects / f"{i}.json", namespace(f"n{i}"))
    for i in range(0, 300, 2):
        (objects / f"{i}.json").unlink()
    update = source.poll()
    assert len(update.snapshot.namespaces) == 150
    assert update.snapshot.revision == 2
    assert source.poll() is None


def test_an_overflowing_queue_is_answered_by_comparing(objects, follow):
    """Where the kernel dropped events everything is compared with what is there."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for name in "abc":
        write(objects / f"{name}.json", namespace(name))
    source, _ = follow(objects)
    for _ in range(limit // 2 + 10):  # two files in turn, as equal events in a row are one
        (objects / "x.txt").touch()
        (objects / "y.txt").touch()
    (objects / "a.json").unlink()
    write(objects / "b.json", namespace("b", x="1"))
    write(objects / "d.json", namespace("d"))
    update = source.poll()
    assert namespaces(update) == ["b", "c", "d"]
    assert update.changed == {ref("Namespace", name) for name in "abd"}
    write(objects / "d.json", namespace("e"))
    assert namespaces(source.poll()) == ["b", "c", "e"]
