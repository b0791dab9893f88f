"""What the plugin hears and says: environment, versions, results in every form, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nodeplane.cni.main import respond
from nodeplane.cni.protocol import VERSIONS, Attachment, CniError, attachment_of
from nodeplane.cni.result import parse_result, print_result

FULL = {
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/run/netns/x",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/opt/cni/bin",
    "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=web",
}
RESULT: dict[str, Any] = {
    "interfaces": [
        {"name": "veth1", "mac": "02:00:00:00:00:01", "mtu": 1450},
        {"name": "eth0", "mac": "02:00:00:00:00:02", "mtu": 1450, "sandbox": "/run/netns/x"},
    ],
    "ips": [
        {"address": "10.244.1.5/32", "gateway": "169.254.1.1", "interface": 1},
        {"address": "fc00::5/128", "gateway": "fe80::1", "interface": 1},
    ],
    "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1", "mtu": 1400}, {"dst": "::/0", "gw": "fe80::1"}],
    "dns": {},
}
PLAIN_LINKS = [{key: value for key, value in one.items() if key != "mtu"} for one in RESULT["interfaces"]]
PLAIN_ROUTES = [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}]
VERSIONED = [{"version": v, **one} for v, one in zip("46", RESULT["ips"], strict=True)]
OLD = {
    "ip4": {"ip": "10.244.1.5/32", "gateway": "169.254.1.1", "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}]},
    "ip6": {"ip": "fc00::5/128", "gateway": "fe80::1", "routes": [{"dst": "::/0", "gw": "fe80::1"}]},
    "dns": {},
}
OF_0_3: dict[str, Any] = {"interfaces": PLAIN_LINKS, "ips": VERSIONED, "routes": PLAIN_ROUTES, "dns": {}}
FORMS: dict[str, dict[str, Any]] = {
    "0.1.0": OLD,
    "0.2.0": OLD,
    "0.3.0": OF_0_3,
    "0.3.1": OF_0_3,
    "0.4.0": OF_0_3,
    "1.0.0": {"interfaces": PLAIN_LINKS, "ips": RESULT["ips"], "routes": PLAIN_ROUTES, "dns": {}},
    "1.1.0": RESULT,
}


@pytest.mark.parametrize("version", VERSIONS)
def test_printed(version: str) -> None:
    """A result is printed in the form of the version that was asked for, and in no other."""
    assert print_result(RESULT, version) == {"cniVersion": version, **FORMS[version]}


@pytest.mark.parametrize("version", VERSIONS)
def test_read_back(version: str) -> None:
    """A result of any version, read and printed in the same version again, is what it was."""
    stated = print_result(RESULT, version)
    assert print_result(parse_result(stated), version) == stated


@pytest.mark.parametrize(
    "raw", [{"ips": [{}]}, {"ip4": {}, "ips": [{"address": "x"}]}, {"routes": [{"dst": "x"}]}, {"ips": [1]}]
)
def test_a_result_that_makes_no_sense(raw: dict[str, Any]) -> None:
    """A result without usable addresses is refused with code 6."""
    with pytest.raises(CniError) as error:
        parse_result(raw)
    assert error.value.code == 6


def test_attachment() -> None:
    """The environment says which attachment a call is about; what it need not say may be missing."""
    args = {"IgnoreUnknown": "1", "K8S_POD_NAME": "web"}
    assert attachment_of("ADD", FULL) == Attachment("c1", "eth0", "/run/netns/x", args)
    assert attachment_of("DEL", {**FULL, "CNI_NETNS": ""}) == Attachment("c1", "eth0", "", args)
    assert attachment_of("GC", {"CNI_PATH": "/opt/cni/bin"}) == Attachment("", "", "", {})


@pytest.mark.parametrize(
    ("verb", "change", "words"),
    [
        ("ADD", {"CNI_NETNS": "", "CNI_PATH": ""}, "ADD needs CNI_NETNS, CNI_PATH: not set"),
        ("CHECK", {"CNI_CONTAINERID": ""}, "CHECK needs CNI_CONTAINERID: not set"),
        ("STATUS", {"CNI_PATH": ""}, "STATUS needs CNI_PATH: not set"),
        ("ADD", {"CNI_CONTAINERID": "../x"}, "CNI_CONTAINERID: must be letters, digits, '_', '.' and '-', is '../x'"),
        ("ADD", {"CNI_IFNAME": "a/b"}, "CNI_IFNAME: must be a link's name of at most 15 characters, is 'a/b'"),
        ("DEL", {"CNI_IFNAME": ".."}, "CNI_IFNAME: must be a link's name of at most 15 characters, is '..'"),
        ("ADD", {"CNI_IFNAME": "e" * 16}, "CNI_IFNAME: must be a link's name of at most 15 characters, is 'eeeeeeeeeeeeeeee'"),
        ("ADD", {"CNI_ARGS": "IP"}, "CNI_ARGS: must be like K=V;K2=V2, is 'IP'"),
    ],
)
def test_environment_refused(verb: str, change: dict[str, str], words: str) -> None:
    """What the environment lacks, or says wrong, is refused with code 4, naming the variable."""
    with pytest.raises(CniError) as error:
        attachment_of(verb, {**FULL, **change})
    assert (error.value.code, error.value.message) == (4, words)


def answer(verb: str, stdin: object, **change: str) -> tuple[int, Any]:
    data = stdin if isinstance(stdin, bytes) else json.dumps(stdin).encode()
    return respond({**FULL, "CNI_COMMAND": verb, **change}, data)


def test_version() -> None:
    """VERSION names every version, whatever is on stdin."""
    assert answer("VERSION", b"") == (0, {"cniVersion": "1.1.0", "supportedVersions": list(VERSIONS)})


@pytest.mark.parametrize(
    ("verb", "stdin", "code", "words", "said"),
    [
        ("EVAPORATE", {}, 4, "CNI_COMMAND: must be one of ADD, DEL, CHECK, VERSION, GC, STATUS, is 'EVAPORATE'", "1.1.0"),
        ("ADD", b"{", 6, "stdin: must be a network configuration in JSON: ", "1.1.0"),
        ("ADD", [1], 6, "stdin: must be a JSON object, is [1]", "1.1.0"),
        ("ADD", {"cniVersion": "2.0.0"}, 1, "cniVersion: must be one of 0.1.0, ", "1.1.0"),
        ("CHECK", {"cniVersion": "0.3.1", "name": "n"}, 1, "cniVersion: must be at least 0.4.0 for CHECK, is '0.3.1'", "0.3.1"),
        ("GC", {"cniVersion": "1.0.0", "name": "n"}, 1, "cniVersion: must be at least 1.1.0 for GC, is '1.0.0'", "1.0.0"),
        ("STATUS", {"name": "n"}, 1, "cniVersion: must be at least 1.1.0 for STATUS, is '0.1.0'", "0.1.0"),
        ("ADD", {"cniVersion": "0.4.0", "name": "a b"}, 7, "name: must be letters, ", "0.4.0"),
        ("ADD", {"cniVersion": "1.1.0", "name": "n"}, 8, "CNI_NETNS: must be a network namespace, is '/run/netns/x'", "1.1.0"),
        (
            "GC",
            {"cniVersion": "1.1.0", "name": "n"},
            7,
            "cni.dev/valid-attachments: must be a list of containerID and",
            "1.1.0",
        ),
    ],
)
def test_errors(verb: str, stdin: object, code: int, words: str, said: str) -> None:
    """An error is one JSON object with the specification's code, in the version the configuration is written in."""
    status, found = answer(verb, stdin)
    assert (status, found["code"], found["cniVersion"]) == (1, code, said)
    assert found["msg"].startswith(words)


def test_the_node_s_own_namespace_is_no_pod_s() -> None:
    """A pod in its host's network has no interface of its own: asked for one, the plugin refuses before it does anything."""
    own = "/proc/self/ns/net"
    status, found = answer("ADD", {"cniVersion": "1.1.0", "name": "n"}, CNI_NETNS=own)
    assert (status, found["code"], found["msg"]) == (1, 8, f"CNI_NETNS: is the node's own network namespace: {own!r}")


def test_a_bug_is_told_in_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever goes wrong inside, the runtime gets an error object and never a traceback instead of one."""

    def fail(_conf: object, _attachment: object, _environment: object) -> None:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr("nodeplane.cni.main.delete", fail)
    status, found = answer("DEL", {"cniVersion": "1.1.0", "name": "n", "dataDir": str(tmp_path)})
    assert (status, found["code"], found["msg"]) == (1, 999, "ZeroDivisionError: by nought")
    assert "Traceback" in found["details"]
