"""``nodeplane policy impact``: words, JSON, exit codes, and what it refuses."""

import io
import json
from pathlib import Path

import pytest

from nodeplane.__main__ import main

CLUSTER = Path(__file__).parents[1] / "golden/policies/cluster.yaml"
OBJECTS = ["--objects", str(CLUSTER)]
WEB = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{namespaceSelector: {matchLabels: {team: ops}}}]
    ports: [{port: http}]
  egress:
  - to: [{ipBlock: {cidr: 203.0.113.0/24}}]
    ports: [{port: 443}, {port: 30000, endPort: 30100}]
"""
PLEASE = """closes  shop/web, shop/web-2 -> shop/db   TCP 5432
        egress: isolated by NetworkPolicy shop/default-deny, shop/web, and no rule fits
closes  ops/monitor -> shop/web, shop/web-2   TCP 1-8079, 8081-65535; UDP every port; SCTP every port
        ingress: isolated by NetworkPolicy shop/default-deny, shop/web, and no rule fits
closes  every IPv4 address outside -> shop/web, shop/web-2   TCP 8080
        ingress: isolated by NetworkPolicy shop/default-deny, shop/web, and no rule fits
opens   shop/web, shop/web-2 -> 203.0.113.64/26   TCP 443, 30000-30100
        egress: NetworkPolicy shop/web: egress[0] lets it through

1 opened, 3 closed
"""


@pytest.fixture
def impact(capsys, tmp_path, monkeypatch):
    """Return how to ask for the impact of a text; the answer is (exit code, stdout, stderr)."""

    def run(text, *words, file="new.yaml"):
        if file == "-":
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        else:
            (tmp_path / file).write_text(text)
        code = main(["policy", "impact", "-f", file if file == "-" else str(tmp_path / file), *OBJECTS, *words])
        return (code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("file", ["new.yaml", "-"])
def test_in_words(impact, file):
    """A changed policy: who no longer gets where, who now does, on which ports, and by which policy; exit 1."""
    assert impact(WEB, file=file) == (1, PLEASE, "")


def test_as_json(impact):
    """The same as a list for programs."""
    code, out, _ = impact(WEB, "-o", "json")
    effects = json.loads(out)
    assert code == 1
    assert [one["change"] for one in effects] == ["close", "close", "close", "open"]
    assert effects[-1] == {
        "change": "open",
        "families": [4],
        "from": ["shop/web", "shop/web-2"],
        "to": ["203.0.113.64/26"],
        "ports": [{"protocol": "TCP", "ports": "443"}, {"protocol": "TCP", "ports": "30000-30100"}],
        "because": ["egress: NetworkPolicy shop/web: egress[0] lets it through"],
    }
    assert effects[2]["from"] == ["0.0.0.0/0"]


def test_nothing_differs(impact):
    """A policy that is there already, or one that selects nobody, changes nothing; exit 0."""
    nobody = WEB.replace("name: web,", "name: nobody,").replace("app: web", "app: none")
    assert impact(nobody) == (0, "nothing opens and nothing closes\n", "")


def test_deleted(impact):
    """With --delete the policy that is there goes, whatever the file says of it; one that is not there is an error."""
    code, out, _ = impact(WEB, "--delete")
    assert code == 1
    assert "closes  ops/monitor -> shop/web, shop/web-2   every port\n" in out
    code, out, err = impact(WEB.replace("name: web,", "name: other,"), "--delete")
    assert (code, out, err) == (2, "", "nodeplane: --delete: there is no NetworkPolicy shop/other\n")


def test_labels(impact):
    """A pod or a namespace with other labels is a change like any other."""
    code, out, _ = impact("{apiVersion: v1, kind: Namespace, metadata: {name: ops, labels: {team: dev}}}")
    assert code == 1
    assert "closes  ops/monitor -> shop/web, shop/web-2" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WEB.replace("port: 443", "port: 99999"), "spec.egress[0].ports[0].port"),
        (WEB.replace("203.0.113.0/24", "203.0.113.0/99"), "203.0.113.0/99"),
        ("{kind: ConfigMap, apiVersion: v1, metadata: {name: x}}", "has no object that policies are made of"),
        ("a: [", "new.yaml"),
    ],
)
def test_bad_input(impact, text, message):
    """A file that cannot be taken as it stands: exit 2, and one line that names field and value."""
    code, out, err = impact(text)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_file_that_is_not_there(capsys):
    """No file: exit 2, and its name."""
    assert main(["policy", "impact", "-f", "/nonexistent", *OBJECTS]) == 2
    assert capsys.readouterr().err == "nodeplane: -f /nonexistent: No such file or directory\n"
