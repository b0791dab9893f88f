"""The command line's contract: exit codes, one-line errors, JSON on stdout alone, the same bytes for the same input."""

import json
from pathlib import Path

import pytest

from nodeplane.__main__ import main

HOSTNAMES = Path(__file__).parent.parent / "golden/hostnames"
OBJECTS = ["--objects", str(HOSTNAMES / "cluster.yaml"), "--node", "n1"]
CONFIG = ["--config", str(HOSTNAMES / "config.yaml")]


def run(capsys, *arguments):
    """Run a command; return (exit code, stdout, stderr)."""
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["render", "--objects", "/nonexistent", "--node", "n1"], "/nonexistent"),
        (["render", "--objects", str(HOSTNAMES / "cluster.yaml"), "--node", "n9"], "--node n9: no such Node"),
        (["render", *OBJECTS, "--mode", "xdp"], "--mode: must be one of iptables, ipvs, nftables, ebpf, is 'xdp'"),
        (["render", *OBJECTS, "--part", "overlay"], "--part overlay: the configuration has no overlay"),
        (["render", *OBJECTS, "--local-address", "x"], "--local-address: must be an IP address"),
        (["agent", *CONFIG, "--objects", "/nonexistent"], "/nonexistent"),
        (["agent", "--config", "/nonexistent", "--objects", str(HOSTNAMES)], "/nonexistent"),
        (["explain", *OBJECTS, "--from", "node"], "give either --from and --to, or --flows"),
        (["explain", *OBJECTS, "--from", "default/none", "--to", "10.0.1.175:80"], "--from: no Pod default/none"),
        (["explain", *OBJECTS, "--from", "1.2.3.4", "--to", "10.0.1.175"], "--to: must be IP:PORT"),
        (["explain", *OBJECTS, "--from", "1.2.3.4", "--to", "10.0.1.175:99999"], "--to: port must be between 1 and 65535"),
        (["explain", *OBJECTS, "--from", "1.2.3.4", "--to", "10.0.1.175:80/ICMP"], "--to: protocol must be TCP, UDP or SCTP"),
    ],
)
def test_bad_usage(capsys, arguments, message):
    """Bad input: exit 2, nothing on stdout, one line on stderr that names the option and the value."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("nodeplane: ")
    assert message in err
    assert err.count("\n") == 1


def test_render_is_reproducible(capsys):
    """The same input gives the same bytes."""
    first = run(capsys, "render", *OBJECTS, *CONFIG, "--mode", "iptables")
    assert first == run(capsys, "render", *OBJECTS, *CONFIG, "--mode", "iptables")
    assert first[0] == 0
    assert first[1].startswith("*mangle\n")


def test_bad_object_is_left_out(capsys, tmp_path):
    """One bad object is named on stderr; the rest is rendered, and stdout stays clean."""
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "apiVersion: v1\nkind: Service\nmetadata: {name: b, namespace: d}\nspec: {clusterIP: 10.9.9.9, ports: [{port: 0}]}\n"
    )
    code, out, err = run(capsys, "render", *OBJECTS, *CONFIG, "--objects", str(bad))
    assert code == 0
    assert out == (HOSTNAMES / "iptables.txt").read_text()
    assert "Service d/b: spec.ports[0].port" in err


def test_explain_json(capsys):
    """One flow as JSON: verdict, endpoints, path, agreement."""
    code, out, _ = run(capsys, "explain", *OBJECTS, *CONFIG, "--from", "10.244.1.9", "--to", "10.0.1.175:80", "-o", "json")
    answer = json.loads(out)
    assert code == 0
    assert answer["service"] == {
        "verdict": "dnat",
        "endpoints": ["10.244.1.5:9376", "10.244.1.6:9376", "10.244.2.7:9376"],
        "masquerade": False,
    }
    assert answer["agree"] is True
    assert answer["path"] == {"kind": "local", "peer": None}


def test_explain_flows(capsys, tmp_path):
    """Many flows: answers in the same order, and source_kind is believed."""
    flows = tmp_path / "flows.json"
    ask = [
        {"source_ip": "10.244.1.9", "protocol": "TCP", "dest_ip": "10.0.1.175", "dest_port": 80},
        {"source_ip": "192.168.1.1", "source_kind": "node", "protocol": "TCP", "dest_ip": "10.0.1.175", "dest_port": 80},
        {
            "source_ip": "198.51.100.1",
            "source_kind": "external",
            "protocol": "TCP",
            "dest_ip": "192.168.1.1",
            "dest_port": 30080,
        },
        {"source_ip": "10.244.1.9", "protocol": "UDP", "dest_ip": "10.0.1.175", "dest_port": 80},
    ]
    flows.write_text(json.dumps(ask))
    code, out, _ = run(capsys, "explain", *OBJECTS, *CONFIG, "--flows", str(flows), "-o", "json")
    answers = json.loads(out)
    assert code == 0
    assert [(a["service"]["verdict"], a["service"]["masquerade"], a["agree"]) for a in answers] == [
        ("dnat", False, True),
        ("dnat", True, True),
        ("dnat", True, True),
        ("pass", False, True),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "--flows: "),
        ('[{"source_ip": "x", "dest_ip": "10.0.1.175", "dest_port": 80}]', "[0].source_ip: must be an IP address, is 'x'"),
        ('[{"source_ip": "::1", "dest_ip": "10.0.1.175", "dest_port": 80}]', "[0]: source_ip ::1 and dest_ip 10.0.1.175"),
        ('[{"source_ip": "10.0.0.1", "dest_ip": "10.0.1.175", "dest_port": 0}]', "[0].dest_port: port must be between"),
    ],
)
def test_bad_flows(capsys, tmp_path, content, message):
    """A bad flow is named by its place in the list."""
    flows = tmp_path / "flows.json"
    flows.write_text(content)
    code, out, err = run(capsys, "explain", *OBJECTS, "--flows", str(flows))
    assert (code, out) == (2, "")
    assert message in err
