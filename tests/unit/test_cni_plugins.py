"""What the plugin has others do, and what it keeps: delegates, addresses, records, readiness. Plugins are small scripts here."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nodeplane.cni import ipam, store
from nodeplane.cni.delegate import call_plugin, find_plugin, pass_on, speaks
from nodeplane.cni.protocol import Attachment, CniError
from nodeplane.cni.readiness import check_agent

POD = Attachment("c1", "eth0", "", {})
Write = Callable[..., dict[str, str]]


@pytest.fixture
def plugin(tmp_path: Path) -> Write:
    """Write a plugin whose body is shell; what it read from stdin is in $conf, and in the file DIR/NAME.VERB."""

    def write(name: str, body: str) -> dict[str, str]:
        directory = tmp_path / "bin"
        directory.mkdir(exist_ok=True)
        file = directory / name
        file.write_text(f'#!/bin/sh\nconf=$(cat)\necho "$conf" >> "{directory}/{name}.$CNI_COMMAND"\n{body}\n')
        file.chmod(0o755)
        return {"PATH": os.environ["PATH"], "CNI_PATH": f"/nowhere:{directory}", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0"}

    return write


def heard(environment: dict[str, str], name: str) -> list[dict[str, Any]]:
    directory = Path(environment["CNI_PATH"].rpartition(":")[2])
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def test_a_plugin_is_called_with_its_configuration(plugin: Write) -> None:
    """A delegate gets configuration and environment, its result is read, and what is newer than itself is said in its version."""
    environment = plugin("own", 'echo "{\\"ips\\": [{\\"version\\": \\"4\\", \\"address\\": \\"10.0.0.2/24\\"}]}"')
    previous = {"ips": [{"address": "10.0.0.2/24"}], "routes": [], "interfaces": [{"name": "eth0", "mtu": 1400}]}
    found = call_plugin("ADD", {"type": "own", "cniVersion": "1.1.0", "name": "n", "prevResult": previous}, environment)
    assert found == {
        "cniVersion": "1.1.0",
        "interfaces": [],
        "ips": [{"address": "10.0.0.2/24"}],
        "routes": [],
        "dns": {},
    }
    told = {"cniVersion": "1.0.0", "interfaces": [{"name": "eth0"}], "ips": [{"address": "10.0.0.2/24"}], "dns": {}}
    assert heard(environment, "own.ADD") == [{"type": "own", "cniVersion": "1.0.0", "name": "n", "prevResult": told}]


def test_an_old_plugin_is_asked_in_its_version(plugin: Write) -> None:
    """A plugin that does not know 1.0.0 is asked again in 0.4.0."""
    environment = plugin(
        "old", 'case $conf in *0.4.0*) echo "{}";; *) echo "{\\"code\\": 1, \\"msg\\": \\"no\\"}"; exit 1;; esac'
    )
    call_plugin("DEL", {"type": "old", "cniVersion": "1.1.0"}, environment)
    assert [one["cniVersion"] for one in heard(environment, "old.DEL")] == ["1.0.0", "0.4.0"]


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ('echo "{\\"code\\": 11, \\"msg\\": \\"full\\"}"; exit 1', 11, "plugin own: full"),
        ("exit 3", 5, "plugin own: ended with status 3"),
        ("echo oops", 6, "plugin own: ADD answered no JSON object"),
        ('echo \'{"code": 1, "msg": "never"}\'; exit 1', 1, "plugin own: never"),
        ("kill -9 $$", 5, "plugin own: ended with status -9"),
    ],
)
def test_what_a_plugin_says_is_passed_on(plugin: Write, body: str, code: int, words: str) -> None:
    """A delegate's code and words reach the runtime; one that says nothing has a code all the same."""
    with pytest.raises(CniError) as error:
        call_plugin("ADD", {"type": "own", "cniVersion": "0.4.0"}, plugin("own", body))
    assert (error.value.code, error.value.message) == (code, words)


def test_much_is_said_both_ways(plugin: Write) -> None:
    """Input and output beyond what a pipe holds pass."""
    environment = plugin("own", "head -c 200000 /dev/zero | tr '\\0' ' '; echo '{}'")
    assert call_plugin("CHECK", {"type": "own", "much": "x" * 200_000}, environment) == {}
    assert len(heard(environment, "own.CHECK")[0]["much"]) == 200_000


def test_a_plugin_that_is_not_there(plugin: Write) -> None:
    """A missing plugin is named with where it was looked for; a directory of its name is none."""
    environment = plugin("own", "")
    (Path(environment["CNI_PATH"].rpartition(":")[2]) / "gone").mkdir()
    with pytest.raises(CniError) as error:
        find_plugin("gone", environment["CNI_PATH"])
    assert (error.value.code, error.value.message) == (7, f"plugin 'gone' is not in CNI_PATH: {environment['CNI_PATH']}")


@pytest.mark.parametrize(("versions", "asked"), [("1.0.0", False), ("1.0.0 1.1.0", True)])
def test_new_verbs_only_for_those_who_know_them(plugin: Write, versions: str, asked: bool) -> None:
    """GC goes to a delegate that says it knows 1.1.0, and to no other."""
    listed = json.dumps({"supportedVersions": versions.split()})
    environment = plugin("own", f"echo '{listed}'")
    assert speaks("own", "1.1.0", environment) is asked
    pass_on("GC", {"type": "own", "cniVersion": "1.1.0"}, environment)
    assert (Path(environment["CNI_PATH"].rpartition(":")[2]) / "own.GC").exists() is asked


# -- addresses -------------------------------------------------------------------------------------------------------


def test_reservations_of_nobody_are_freed(tmp_path: Path) -> None:
    """Of host-local's files those go whose attachment is not listed, in the old form too; its own files and others stay."""
    held = {
        "10.244.1.2": "c1\r\neth0",
        "10.244.1.3": "c1\r\nnet1",
        "10.244.1.4": "c2\r\neth0",
        "10.244.1.5": "c1",
        "10.244.1.6": "c3",
        "fc00::5": "c2\r\neth0",
        "fc00__6": "c1\r\neth0",
        "last_reserved_ip.0": "10.244.1.6",
        "lock": "",
    }
    for name, text in held.items():
        (tmp_path / name).write_text(text)
    freed = ipam.collect_host_local(str(tmp_path), {("c1", "eth0")})
    assert freed == ["10.244.1.3", "10.244.1.4", "10.244.1.6", "fc00::5"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(held.keys() - set(freed))
    assert ipam.collect_host_local(str(tmp_path / "none"), set()) == []


def test_no_address_is_an_error(plugin: Write) -> None:
    """Address management that answers without an address, or has no name, is refused."""
    environment = plugin("own", "echo '{}'")
    with pytest.raises(CniError, match="plugin own: gave no address"):
        ipam.addresses({"name": "n", "ipam": {"type": "own"}}, environment)
    with pytest.raises(CniError, match=r"ipam.type: must be a plugin's name, is missing"):
        ipam.ask("DEL", {"name": "n", "ipam": {}}, environment)


def test_address_management_may_say_not_ready(plugin: Write) -> None:
    """What keeps address management from answering makes STATUS say 50."""
    environment = plugin(
        "own", 'echo \'{"supportedVersions": ["1.1.0"], "code": 51, "msg": "full"}\'; [ $CNI_COMMAND = VERSION ]'
    )
    for kind, words in (("own", "plugin own: full"), ("gone", f"plugin 'gone' is not in CNI_PATH: {environment['CNI_PATH']}")):
        with pytest.raises(CniError) as error:
            ipam.check_ready({"name": "n", "ipam": {"type": kind}}, environment)
        assert (error.value.code, error.value.message) == (50, words)


# -- records ---------------------------------------------------------------------------------------------------------


def test_a_record_is_kept_until_it_is_forgotten(tmp_path: Path) -> None:
    """What an attachment is made with is found again, for its interface only, and forgotten twice without complaint."""
    conf = {"name": "n", "type": "nodeplane-cni", "dataDir": str(tmp_path), "ipam": {"type": "host-local"}}
    store.keep(conf, POD)
    store.keep(conf, POD._replace(ifname="net1"))
    assert store.find(conf, POD) == conf
    assert store.find(conf, POD._replace(container="c2")) is None
    assert store.kept(conf) == [("c1", "eth0"), ("c1", "net1")]
    assert (tmp_path / "n/c1:eth0").stat().st_mode & 0o777 == 0o600
    for _ in range(2):
        store.forget(conf, POD)
    assert [p.name for p in (tmp_path / "n").iterdir()] == ["c1:net1"]


def test_a_damaged_record_counts_as_none(tmp_path: Path) -> None:
    """A record that is no configuration does not keep a DEL from doing what can be done without."""
    conf = {"name": "n", "dataDir": str(tmp_path)}
    (tmp_path / "n").mkdir()
    for text in ("", "{", "[]", '{"type": "x"}'):
        (tmp_path / "n/c1:eth0").write_text(text)
        assert store.find(conf, POD) is None


def test_flannel_s_own_record_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod that flannel's plugin attached goes with the delegate that flannel wrote down."""
    monkeypatch.setattr(store, "FLANNEL_DIR", str(tmp_path / "flannel"))
    (tmp_path / "flannel").mkdir()
    made = {"type": "bridge", "name": "n", "ipam": {"type": "host-local"}}
    (tmp_path / "flannel/c1").write_text(json.dumps(made))
    conf = {"name": "n", "dataDir": str(tmp_path)}
    assert store.find(conf, POD) == made
    store.forget(conf, POD)
    assert list((tmp_path / "flannel").iterdir()) == []


def test_half_written_records_are_swept(tmp_path: Path) -> None:
    """What a call that was killed left half written goes; what a living one is writing stays."""
    conf = {"name": "n", "dataDir": str(tmp_path)}
    (tmp_path / "n").mkdir()
    for name in (".4194305", f".{os.getpid()}", "c1:eth0"):  # the first is no process: beyond the kernel's PID_MAX_LIMIT
        (tmp_path / "n" / name).touch()
    store.sweep(conf)
    assert sorted(p.name for p in (tmp_path / "n").iterdir()) == [f".{os.getpid()}", "c1:eth0"]


# -- readiness -------------------------------------------------------------------------------------------------------


def test_the_agent_s_readiness(tmp_path: Path) -> None:
    """Without an agent, and before its first round, pods cannot come; where there never was one, somebody else's word counts."""
    check_agent(str(tmp_path))
    lock = os.open(tmp_path / "agent.lock", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(CniError, match="no agent runs on this node") as error:
            check_agent(str(tmp_path))
        assert error.value.code == 50
        fcntl.flock(lock, fcntl.LOCK_EX)
        for text in (None, "{", '{"last_sync": 0}'):
            if text is not None:
                (tmp_path / "status.json").write_text(text)
            with pytest.raises(CniError, match="the agent has only started"):
                check_agent(str(tmp_path))
        (tmp_path / "status.json").write_text('{"last_sync": 1.5}')
        check_agent(str(tmp_path))
    finally:
        os.close(lock)
