"""An API server over HTTP: credentials of every kind, answers that break off, and the commands that ask it."""

from __future__ import annotations

import json
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_api import node, service
from http_api import Server, kubeconfig

from clusterstate.sources import kubeclient
from clusterstate.sources.kubeclient import KubeClient
from clusterstate.sources.reflector import ApiError
from nodeplane.__main__ import main


@pytest.fixture
def served() -> Iterator[Callable[..., Server]]:
    """Return what starts servers."""
    started: list[Server] = []

    def start(*args: Any, **more: Any) -> Server:
        started.append(Server(*args, **more))
        return started[-1]

    yield start
    for server in started:
        server.close()


def test_a_token_is_sent_and_read_again_when_it_is_refused(tmp_path, served):
    """The token of the file goes with each request; after 401 the file is read again, once."""
    accepted = ["Bearer one"]
    server = served(lambda request: request.headers.get("Authorization") in accepted)
    client = KubeClient(kubeconfig(tmp_path, server.url, {"token": "one"}))
    assert json.loads(client.get("/version"))["major"] == "1"
    accepted[:] = ["Bearer two"]
    with pytest.raises(ApiError, match=r"^401 Unauthorized$"):
        client.get("/version")
    kubeconfig(tmp_path, server.url, {"token": "two"})
    assert json.loads(client.get("/version"))["major"] == "1"
    assert server.headers[-1]["User-Agent"] == "nodeplane"


def test_a_patch(tmp_path, served):
    """A patch goes out as a strategic merge patch, and comes back as the object; a refusal is the server's own words."""
    allowed = [True]
    server = served(lambda _request: allowed[0])
    client = KubeClient(kubeconfig(tmp_path, server.url, {"token": "one"}))
    server.api.put("/api/v1/nodes", node("n1"))
    body = b'{"metadata":{"annotations":{"a":"b"}}}'
    assert json.loads(client.patch("/api/v1/nodes/n1/status", body))["metadata"]["annotations"] == {"a": "b"}
    assert server.patches == [("/api/v1/nodes/n1/status", body)]
    assert server.headers[-1]["Content-Type"] == "application/strategic-merge-patch+json"
    assert server.headers[-1]["authorization"] == "Bearer one"
    allowed[0] = False
    with pytest.raises(ApiError, match=r"^403 forbidden$"):
        client.patch("/api/v1/nodes/n1/status", b"{}")


def test_a_plugin_is_asked_for_the_token(tmp_path, served):
    """An exec plugin of the kubeconfig says the token."""
    server = served(lambda request: request.headers.get("Authorization") == "Bearer from-plugin")
    plugin = tmp_path / "plugin"
    said = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "from-plugin"}}
    plugin.write_text(f"#!/bin/sh\necho '{json.dumps(said)}'\n")
    plugin.chmod(0o755)
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin), "interactiveMode": "Never"}}
    assert b"major" in KubeClient(kubeconfig(tmp_path, server.url, user)).get("/version")


def certified(folder: Path) -> ssl.SSLContext:
    """Make a certificate of 127.0.0.1, its own authority, as files ``cert`` and ``key``; return a server's context with it."""
    subject = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-keyout", folder / "key", "-out", folder / "cert"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command = ["openssl", "req", "-x509", *curve, "-nodes", "-days", "2", *made, *subject]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert", folder / "key")
    return context


def test_client_certificates(tmp_path, served):
    """A server that asks for a certificate gets that of the file, and its own is held against the file's authority."""
    context = certified(tmp_path)
    context.load_verify_locations(tmp_path / "cert")
    context.verify_mode = ssl.CERT_REQUIRED
    server = served(tls=context)
    files = {"client-certificate": str(tmp_path / "cert"), "client-key": str(tmp_path / "key")}
    trusted = {"certificate-authority": str(tmp_path / "cert")}
    assert b"major" in KubeClient(kubeconfig(tmp_path, server.url, files, **trusted)).get("/version")
    with pytest.raises(ApiError, match="certificate"):
        KubeClient(kubeconfig(tmp_path, server.url, files)).get("/version")
    with pytest.raises(ApiError):
        KubeClient(kubeconfig(tmp_path, server.url, {}, **trusted)).get("/version")


def test_a_pods_own_account(tmp_path, served, monkeypatch):
    """In a cluster the pod's token and authority are taken, and a token that was renewed is found."""
    accepted = ["bearer first"]
    server = served(lambda request: request.headers.get("Authorization") in accepted, tls=certified(tmp_path))
    token = tmp_path / "token"
    token.write_text("first")
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(tmp_path / "cert"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.http.server_port))
    client = KubeClient(None)
    assert client.server == server.url
    assert b"major" in client.get("/version")
    token.write_text("second")
    accepted[:] = ["bearer second"]
    assert b"major" in client.get("/version")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    with pytest.raises(ApiError, match="in-cluster configuration: Service host/port is not set"):
        KubeClient(None)


def test_an_answer_that_breaks_off(tmp_path, served):
    """What came whole before a watch breaks off is told, then that it broke off."""
    server = served()
    server.api.put("/api/v1/nodes", node("n1"))
    client = KubeClient(kubeconfig(tmp_path, server.url, {}))
    lines = client.lines("/api/v1/nodes", {"watch": "true", "resourceVersion": "100"})
    assert json.loads(next(lines))["object"]["metadata"]["name"] == "n1"
    server.api.cut()
    with pytest.raises(ApiError, match="broke off"):
        next(lines)


BAD = {
    "no file": (None, "kubeconfig"),
    "no YAML": ("a: [", "kubeconfig: "),
    "no context": ("apiVersion: v1\nkind: Config\ncurrent-context: gone\n", "gone"),
    "empty": ("", "Invalid kube-config"),
}


@pytest.mark.parametrize(("text", "words"), BAD.values(), ids=list(BAD))
def test_a_kubeconfig_that_is_none(tmp_path, capsys, text, words):
    """A file that says nothing usable is named, in one line, with what is wrong."""
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    assert main(["render", "--kubeconfig", str(path), "--node", "n1"]) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1


def test_commands_ask_the_server(tmp_path, served, capsys):
    """``render`` and ``explain`` print from a server what they would from files."""
    server = served()
    server.api.put("/api/v1/nodes", node("n1"))
    server.api.put("/api/v1/services", service("web", "10.96.0.7"))
    file = kubeconfig(tmp_path, server.url, {})
    objects = tmp_path / "objects.json"
    items = [one for held in server.api.objects.values() for one in held.values()]
    objects.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    assert main(["render", "--objects", str(objects), "--node", "n1"]) == 0
    wanted = capsys.readouterr().out
    assert "ns/web" in wanted
    assert main(["render", "--kubeconfig", str(file), "--node", "n1"]) == 0
    assert capsys.readouterr().out == wanted
    pod = {"nodeName": "n1", "containers": [{"name": "c"}]}
    status = {"phase": "Running", "podIPs": [{"ip": "10.244.1.5"}]}
    server.api.put("/api/v1/pods", {"metadata": {"namespace": "ns", "name": "client"}, "spec": pod, "status": status})
    assert main(["explain", "--kubeconfig", str(file), "--node", "n1", "--from", "ns/client", "--to", "10.96.0.7:80"]) == 0
    printed = capsys.readouterr().out
    assert "10.244.1.5 -> 10.96.0.7:80" in printed
    assert "ns/web" in printed
    assert main(["render", "--kubeconfig", str(file), "--node", "n9"]) == 2
    assert "no such Node among the objects; there are n1" in capsys.readouterr().err


def test_a_server_that_is_away(tmp_path, served, capsys, monkeypatch):
    """A command that asks a server which does not answer says which, and why, and ends with 1."""
    monkeypatch.setattr("nodeplane.cluster_source.ONE_SHOT", 0.5)
    monkeypatch.setattr(kubeclient, "CONNECT", 0.2)
    server = served()
    server.api.away("etcd is away")
    file = kubeconfig(tmp_path, server.url, {})
    assert main(["render", "--kubeconfig", str(file), "--node", "n1"]) == 1
    assert "503 etcd is away" in capsys.readouterr().err


def test_files_or_a_server(tmp_path, capsys):
    """Objects come from one place, and from somewhere."""
    file = kubeconfig(tmp_path, "http://127.0.0.1:1", {})
    assert main(["render", "--kubeconfig", str(file), "--objects", str(file), "--node", "n1"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert main(["render", "--node", "n1"]) == 2
    assert "give --objects or --kubeconfig" in capsys.readouterr().err
