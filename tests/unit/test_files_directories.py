"""The file source: directories and given paths that come, go, move and overlap, and what cannot be read."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from object_files import following, namespace, namespaces, replace, service, told, write

from clusterstate.snapshot import Snapshot
from clusterstate.sources.files import FileSource, load_objects
from clusterstate.sources.tree import SourceError

GONE = "is gone; what it held stays until it is back (an empty directory takes it away)"


@pytest.fixture
def objects(tmp_path):
    directory = tmp_path / "objects"
    directory.mkdir()
    return directory


@pytest.fixture
def follow():
    with following() as start:
        yield start


def descriptors() -> list[str]:
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


def test_a_directory_that_is_moved_away_keeps_its_objects(objects, follow):
    """A given directory that goes is an error, and its objects stay until it is back."""
    write(objects / "a.json", namespace("a"))
    write(objects / "b.json", namespace("b"))
    source, before = follow(objects)
    away = objects.with_name("away")
    objects.rename(away)
    update = source.poll()
    gone = f"{objects}: {GONE}"
    assert told(update) == [gone]
    assert update.snapshot.namespaces == before.snapshot.namespaces
    write(away / "a.json", namespace("x"))
    assert source.poll() is None
    (away / "b.json").unlink()
    away.rename(objects)
    update = source.poll()
    assert (namespaces(update), update.errors) == (["x"], ())
    write(objects / "c.json", namespace("c"))
    assert namespaces(source.poll()) == ["c", "x"]


def test_a_directory_that_is_deleted_keeps_its_objects(objects, follow):
    """Deleting a tree file by file is no deletion of its objects: an empty directory put in its place is."""
    (objects / "sub").mkdir()
    for i in range(50):
        write(objects / f"n{i}.json", namespace(f"n{i}"))
        write(objects / "sub" / f"m{i}.json", namespace(f"m{i}"))
    source, before = follow(objects)
    shutil.rmtree(objects)
    update = source.poll()
    assert f"{objects}: {GONE}" in told(update)
    assert update.snapshot.namespaces == before.snapshot.namespaces
    assert len(before.snapshot.namespaces) == 100
    (objects / "sub").mkdir(parents=True)
    update = source.poll()
    assert (namespaces(update), update.errors) == ([], ())


def test_directories_above_that_go_and_come_back(tmp_path, follow):
    """Where the parent goes too, the path is found again however many directories have to be made first."""
    directory = tmp_path / "x" / "y" / "objects"
    directory.mkdir(parents=True)
    write(directory / "a.json", namespace("a"))
    source, _ = follow(directory)
    shutil.rmtree(tmp_path / "x")
    assert told(source.poll()) == [f"{directory}: {GONE}"]
    (tmp_path / "x").mkdir()
    assert source.poll() is None
    (tmp_path / "x" / "y").mkdir()
    assert source.poll() is None
    directory.mkdir()
    write(directory / "b.json", namespace("b"))
    update = source.poll()
    assert (namespaces(update), update.errors) == (["b"], ())


def test_subdirectories_come_go_and_move(objects, follow):
    """A new directory is followed, a renamed one keeps its objects under its new name, one that goes keeps them as an error."""
    source, _ = follow(objects)
    (objects / "new" / "deep").mkdir(parents=True)
    write(objects / "new" / "deep" / "a.json", namespace("a"))
    assert namespaces(source.poll()) == ["a"]
    write(objects / "new" / "deep" / "a.json", namespace("b"))
    assert namespaces(source.poll()) == ["b"]
    (objects / "new").rename(objects / "renamed")
    assert source.poll() is None
    write(objects / "renamed" / "deep" / "a.json", namespace("c"))
    assert namespaces(source.poll()) == ["c"]
    shutil.rmtree(objects / "renamed")
    update = source.poll()
    assert (namespaces(update), told(update)) == (["c"], [f"{objects}/renamed: {GONE}"])
    (objects / "renamed" / "deep").mkdir(parents=True)
    update = source.poll()
    assert (namespaces(update), update.errors) == ([], ())


def test_deleting_files_one_by_one_deletes_objects(objects, follow):
    """As long as the directory stands, deleted files are deleted objects, all of them even."""
    for name in "abc":
        write(objects / f"{name}.json", namespace(name))
    source, _ = follow(objects)
    for name in "abc":
        (objects / f"{name}.json").unlink()
    update = source.poll()
    assert (namespaces(update), len(update.changed), update.errors) == ([], 3, ())


def test_a_single_file_is_followed(tmp_path, follow):
    """A given file may have any name, be rewritten, renamed over, lost and found."""
    path = tmp_path / "cluster.conf"
    write(path, namespace("a"))
    source, update = follow(path)
    assert namespaces(update) == ["a"]
    write(tmp_path / "other.json", namespace("never"))
    assert source.poll() is None
    write(path, namespace("b"))
    assert namespaces(source.poll()) == ["b"]
    replace(path, namespace("c"))
    assert namespaces(source.poll()) == ["c"]
    path.unlink()
    update = source.poll()
    assert (namespaces(update), told(update)) == (["c"], [f"{path}: is gone; what it held stays until it is back"])
    write(path, namespace("d"))
    update = source.poll()
    assert (namespaces(update), update.errors) == (["d"], ())


def test_a_kubernetes_volume_is_followed(tmp_path, follow):
    """The swap of ``..data``, by which kubelet updates a mounted ConfigMap, is one change of all its files."""
    volume = tmp_path / "volume"
    (volume / "..1").mkdir(parents=True)
    write(volume / "..1" / "a.json", namespace("a"))
    (volume / "..data").symlink_to("..1")
    (volume / "a.json").symlink_to("..data/a.json")
    source, update = follow(volume)
    assert namespaces(update) == ["a"]
    (volume / "..2").mkdir()
    write(volume / "..2" / "a.json", namespace("a", x="2"))
    write(volume / "..2" / "b.json", namespace("b"))
    (volume / "..data_tmp").symlink_to("..2")
    (volume / "..data_tmp").rename(volume / "..data")
    (volume / "b.json").symlink_to("..data/b.json")
    shutil.rmtree(volume / "..1")
    update = source.poll()
    assert (namespaces(update), update.errors) == (["a", "b"], ())
    assert update.snapshot.namespaces["a"].labels["x"] == "2"


def test_a_missing_path_is_bad_usage(tmp_path, follow):
    """A path that does not exist from the start is refused, by its name."""
    for read in (follow, lambda path: load_objects([path])):
        with pytest.raises(SourceError, match=f"^{tmp_path}/nowhere: no such file or directory$"):
            read(tmp_path / "nowhere")


def test_what_cannot_be_read_stands_as_an_error(objects, follow):
    """Directories, pipes and dangling links with the name of an object file are errors and hold nothing up."""
    write(objects / "a.json", namespace("a"))
    os.mkfifo(objects / "pipe.json")
    (objects / "dangling.json").symlink_to("nowhere")
    (objects / "loop.json").symlink_to(".")
    _, update = follow(objects)
    expected = [
        f"{objects}/dangling.json: cannot be read: No such file or directory",
        f"{objects}/loop.json: cannot be read: Is a directory",
        f"{objects}/pipe.json: cannot be read: not a regular file",
    ]
    assert (namespaces(update), told(update)) == (["a"], expected)
    snapshot, errors = load_objects([objects])
    assert ([str(e) for e in errors], sorted(snapshot.namespaces)) == (expected, ["a"])


def test_several_paths_are_one_cluster(tmp_path, follow):
    """Files and directories mix; a path given twice, or one below another, is no duplicate."""
    (tmp_path / "d" / "sub").mkdir(parents=True)
    write(tmp_path / "d" / "sub" / "a.json", namespace("a"))
    write(tmp_path / "one.yaml", service("web"))
    paths = (tmp_path / "d", tmp_path / "one.yaml", tmp_path / "d" / "." / "sub", tmp_path / "one.yaml")
    source, update = follow(*paths)
    assert update.errors == ()
    assert [str(o.ref) for o in update.snapshot.objects()] == ["Namespace a", "Service default/web"]
    snapshot, errors = load_objects(paths)
    assert (snapshot, errors) == (update.snapshot, ())
    write(tmp_path / "d" / "sub" / "a.json", namespace("b"))
    write(tmp_path / "one.yaml", service("db"))
    update = source.poll()
    assert [str(o.ref) for o in update.snapshot.objects()] == ["Namespace b", "Service default/db"]


def test_the_working_directory_can_be_followed(objects, follow, monkeypatch):
    """A relative path is as good as any, and errors name files as they were given."""
    monkeypatch.chdir(objects)
    write(Path("a.json"), namespace("a"))
    source, update = follow(Path())
    (objects / "sub").mkdir()
    Path("sub/b.json").write_text("{")
    update = source.poll()
    assert (namespaces(update), [e.source for e in update.errors]) == (["a"], ["sub/b.json"])
    Path("a.json").unlink()
    assert namespaces(source.poll()) == []


def test_nothing_is_left_open(objects):
    """A closed source has given back its descriptors."""
    before = descriptors()
    source = FileSource([objects])
    with suppress(SourceError):
        source.load()
    source.close()
    assert load_objects([objects]) == (Snapshot(revision=1), ())
    assert descriptors() == before
