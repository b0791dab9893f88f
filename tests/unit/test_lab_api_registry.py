"""The lab's API server: what may be written, what is filled in, what a refusal says, and how objects look as rows."""

from __future__ import annotations

import itertools
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from netnslab.api.access import may
from netnslab.api.events import core_event
from netnslab.api.front import read_path
from netnslab.api.kinds import DEPLOYMENT, EVENT, KINDS, NAMESPACE, NETWORK_POLICY, NODE, POD, SERVICE
from netnslab.api.protobuf import decode
from netnslab.api.refusal import Refusal
from netnslab.api.registry import Registry
from netnslab.api.store import Store
from netnslab.api.strict import unknown_fields
from netnslab.api.table import COLUMNS, age, label_selector, table
from netnslab.memory import Memory
from netnslab.topology import parse_topology

DAEMONSET = Path(__file__).parents[2] / "deploy/daemonset.yaml"


@pytest.fixture
def registry():
    numbers = itertools.count(1)
    store = Store(lambda: "2026-01-01T00:00:00Z", lambda: f"uid-{next(numbers)}")
    topology = parse_topology({"nodes": [{"name": "n1"}, {"name": "n2"}]}, "here")
    found = Registry(store, topology, Memory(), lambda: "2026-01-01T00:00:00Z", random.Random(1))
    for name in ("default", "kube-system"):
        found.create(NAMESPACE, "", {"metadata": {"name": name}})
    return found


def service(name="web", **spec):
    return {"kind": "Service", "metadata": {"name": name}, "spec": {"ports": [{"port": 80}], **spec}}


def pod(name="a", **spec):
    return {"kind": "Pod", "metadata": {"name": name}, "spec": {"containers": [{"name": "c", "image": "x"}], **spec}}


def refused(call, *words, code):
    with pytest.raises(Refusal) as found:
        call()
    assert found.value.code == code, found.value
    for word in words:
        assert word in str(found.value)


def test_a_service_has_its_addresses_in_the_answer(registry):
    """ClusterIP, NodePort and defaults are there when the answer goes out, and stay when an update leaves them out."""
    made = registry.create(SERVICE, "default", service(type="NodePort"))
    spec = made["spec"]
    assert (spec["clusterIP"], spec["ports"][0]["nodePort"]) == ("10.96.1.1", 30086)
    assert (spec["ports"][0]["protocol"], spec["ports"][0]["targetPort"], spec["sessionAffinity"]) == ("TCP", 80, "None")
    again = registry.update(SERVICE, ("default", "web"), service(type="NodePort", selector={"a": "b"}))
    assert (again["spec"]["clusterIP"], again["spec"]["ports"]) == (spec["clusterIP"], spec["ports"])
    assert again["metadata"]["uid"] == made["metadata"]["uid"]


@pytest.mark.parametrize(
    ("kind", "body", "words", "code"),
    [
        (SERVICE, service("b", clusterIP="10.96.1.1"), ("spec.clusterIPs", "10.96.1.1 is that of Service default/web"), 422),
        (SERVICE, service("b", ports=[{"port": 99999}]), ("spec.ports[0].port", "99999"), 422),
        (SERVICE, service(), ('services "web" already exists',), 409),
        (SERVICE, {**service("b"), "kind": "Pod"}, ("does not match v1 Service",), 400),
        (SERVICE, {"metadata": {}}, ("metadata.name",), 422),
        (SERVICE, {**service("b"), "metadata": {"name": "b", "namespace": "other"}}, ("namespace",), 400),
        (SERVICE, [], ("must be an object",), 400),
        (POD, pod(containers=[]), ("spec.containers", "Required"), 422),
        (POD, pod("UPPER"), ("metadata.name", "UPPER"), 422),
        (NODE, {"metadata": {"name": "n9"}}, ("the lab's nodes are n1, n2",), 422),
        (
            NETWORK_POLICY,
            {"metadata": {"name": "p"}, "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": 0}]}]}},
            ("port",),
            422,
        ),
        (DEPLOYMENT, {"metadata": {"name": "d"}, "spec": {"template": pod()}}, ("spec.selector",), 422),
        (
            DEPLOYMENT,
            {"metadata": {"name": "d"}, "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"spec": pod()["spec"]}}},
            ("does not match template",),
            422,
        ),
    ],
)
def test_what_cannot_stand_is_refused(registry, kind, body, words, code):
    """A refusal names object, field and value, and nothing was written."""
    registry.create(SERVICE, "default", service())
    version = registry.store.version
    refused(lambda: registry.create(kind, "default" if kind.namespaced else "", body), *words, code=code)
    assert registry.store.version == version


def test_unknown_fields_are_refused_where_that_is_asked_for(registry):
    """With strict validation a misspelt field is refused by its path, at any depth; without, the object is taken."""
    body = service(selectr={"a": "b"}, ports=[{"port": 80, "prot": "TCP"}])
    refused(lambda: registry.create(SERVICE, "default", body, strict=True), '"spec.selectr"', '"spec.ports[0].prot"', code=400)
    assert unknown_fields(POD, pod(nodeSelector={"any": "key"})) == []
    registry.create(SERVICE, "default", body)


def test_a_dry_run_writes_nothing(registry):
    """A dry run answers as if, and leaves all as it was."""
    version = registry.store.version
    assert registry.create(SERVICE, "default", service(), dry_run=True)["spec"]["clusterIP"]
    assert registry.store.version == version


def test_no_object_without_its_namespace(registry):
    """An object in a namespace that is not there, or that is going, is refused."""
    refused(lambda: registry.create(POD, "dev", pod()), 'namespaces "dev" not found', code=404)
    registry.create(NAMESPACE, "", {"metadata": {"name": "dev"}})
    registry.delete(NAMESPACE, ("", "dev"), {})
    refused(lambda: registry.create(POD, "dev", pod()), "being terminated", code=403)
    refused(lambda: registry.delete(NAMESPACE, ("", "default"), {}), "may not be deleted", code=403)


def test_spec_and_status_are_written_apart(registry):
    """What a client says of the status with the rest counts for nothing; at .../status nothing else does."""
    registry.create(POD, "default", {**pod(), "status": {"phase": "Running"}})
    key = ("default", "a")
    assert registry.store.get(POD, key).raw["status"] == {"phase": "Pending"}
    registry.update(POD, key, {**pod(), "metadata": {"name": "a", "labels": {"x": "y"}}, "status": {"phase": "Failed"}})
    assert registry.store.get(POD, key).raw["status"] == {"phase": "Pending"}
    registry.update(POD, key, {**pod(containers=[]), "status": {"phase": "Running"}}, part="status")
    found = registry.store.get(POD, key).raw
    assert (found["status"], found["spec"]["containers"][0]["image"]) == ({"phase": "Running"}, "x")


def test_a_pod_does_not_change_but_in_its_image(registry):
    """A pod's containers and node are for life; its image and labels are not."""
    registry.create(POD, "default", pod())
    key = ("default", "a")
    registry.update(POD, key, pod(containers=[{"name": "c", "image": "y"}]))
    refused(lambda: registry.update(POD, key, pod(containers=[{"name": "d", "image": "y"}])), "Forbidden", code=422)


def test_nobody_writes_over_what_he_has_not_seen(registry):
    """An update with an old resource version is a conflict."""
    first = registry.create(SERVICE, "default", service())
    registry.update(SERVICE, ("default", "web"), service(selector={"a": "b"}))
    refused(lambda: registry.update(SERVICE, ("default", "web"), first), "has been modified", code=409)


def test_events_of_either_form_are_one(registry):
    """An Event of events.k8s.io is kept as kubectl asks for it."""
    event = {
        "metadata": {"name": "e", "namespace": "default"},
        "note": "so",
        "regarding": {"kind": "Node"},
        "reportingController": "me",
    }
    made = registry.create(EVENT, "default", core_event(event))
    assert (made["message"], made["involvedObject"], made["source"]) == ("so", {"kind": "Node"}, {"component": "me"})


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/api/v1/pods", ("pods", "", "", "")),
        ("/api/v1/namespaces/default/pods", ("pods", "default", "", "")),
        ("/api/v1/namespaces/default/pods/a/status", ("pods", "default", "a", "status")),
        ("/api/v1/namespaces/default", ("namespaces", "", "default", "")),
        ("/api/v1/namespaces/default/status", ("namespaces", "", "default", "status")),
        ("/apis/apps/v1/namespaces/x/deployments/d/scale", ("deployments", "x", "d", "scale")),
        ("/apis/events.k8s.io/v1/namespaces/default/events", ("events", "default", "", "")),
        ("/api/v1/nodes/n1", ("nodes", "", "n1", "")),
    ],
)
def test_paths(path, wanted):
    """A path says kind, namespace, name and subresource."""
    found = read_path(path)
    assert (found.kind.plural, found.namespace, found.name, found.part) == wanted


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/configmaps",
        "/apis/apps/v1/pods",
        "/api/v1/namespaces/x/nodes",
        "/api/v1/pods/a/exec",
        "/api/v1/services/a/scale",
    ],
)
def test_paths_that_are_not_served(path):
    """What the lab does not serve is 404."""
    refused(lambda: read_path(path), code=404)


def test_agents_may_what_the_cluster_role_says():
    """A lab's agent has the rights that deploy/daemonset.yaml gives one on a real cluster, and no others."""
    role = next(one for one in yaml.safe_load_all(DAEMONSET.read_text()) if one["kind"] == "ClusterRole")
    verbs = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
    stated = {(verb, resource) for rule in role["rules"] for verb in rule["verbs"] for resource in rule["resources"]}
    parts = [(kind.plural, part) for kind in KINDS for part in ("", "status", "scale", "log")]
    granted = {(v, f"{plural}/{part}".strip("/")) for v in verbs for plural, part in parts if may("agent", v, plural, part)}
    assert granted == stated


NOW = datetime(2026, 1, 31, tzinfo=UTC)


@pytest.mark.parametrize(
    ("ago", "words"),
    [
        ({"seconds": 5}, "5s"),
        ({"seconds": 119}, "119s"),
        ({"minutes": 2}, "2m"),
        ({"minutes": 5, "seconds": 3}, "5m3s"),
        ({"minutes": 12}, "12m"),
        ({"hours": 3, "minutes": 20}, "3h20m"),
        ({"hours": 9, "minutes": 5}, "9h"),
        ({"days": 2, "hours": 5}, "2d5h"),
        ({"days": 30}, "30d"),
    ],
)
def test_ages(ago, words):
    """An age is said as kubectl says it."""
    assert age((NOW - timedelta(**ago)).strftime("%Y-%m-%dT%H:%M:%SZ"), NOW) == words


def test_rows(registry):
    """A Service's row has its columns, and as much of the object as was asked for."""
    made = registry.create(SERVICE, "default", service(type="NodePort", externalIPs=["80.11.12.10"]))
    found = table(SERVICE, [made], 7, "Metadata", NOW)
    assert [column["name"] for column in found["columnDefinitions"]] == [
        *("Name", "Type", "Cluster-IP", "External-IP", "Port(s)", "Age", "Selector")
    ]
    assert found["rows"][0]["cells"] == ["web", "NodePort", "10.96.1.1", "80.11.12.10", "80:30086/TCP", "30d", "<none>"]
    assert found["rows"][0]["object"] == {
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": made["metadata"],
    }
    assert table(SERVICE, [made], 7, "Object", NOW)["rows"][0]["object"] == made
    assert table(SERVICE, [made], 7, "None", NOW)["rows"][0]["object"] is None


def test_every_kind_has_columns():
    """There is no kind that kubectl could not show."""
    assert set(COLUMNS) == {kind.kind for kind in KINDS}


def test_label_selectors_in_words():
    """A LabelSelector stands in a column as one would type it."""
    said = {
        "matchLabels": {"a": "b"},
        "matchExpressions": [{"key": "x", "operator": "In", "values": ["1", "2"]}, {"key": "y", "operator": "Exists"}],
    }
    assert label_selector(said) == "a=b,x in (1,2),y"
    assert label_selector({}) == "<none>"


def encoded(number, value):
    """Encode one protobuf field."""
    if isinstance(value, int):
        return bytes([number << 3]) + (bytes([value]) if value < 128 else bytes([value & 127 | 128, value >> 7]))
    return (
        bytes([number << 3 & 127 | 2 | (128 if number > 15 else 0), *([number >> 4] if number > 15 else [])])
        + bytes([len(value)])
        + value
    )


def test_protobuf():
    """A Service as kubectl encodes it is the same Service; what is not known is refused, and nothing lost in silence."""
    port = encoded(2, b"TCP") + encoded(3, 80) + encoded(4, encoded(1, 1) + encoded(2, 0) + encoded(3, b"http"))
    spec = (
        encoded(1, port)
        + encoded(2, encoded(1, b"app") + encoded(2, b"web"))
        + encoded(4, b"NodePort")
        + encoded(18, b"10.96.0.9")
    )
    body = encoded(1, encoded(1, b"web")) + encoded(2, spec)
    kind = encoded(1, encoded(1, b"v1") + encoded(2, b"Service"))
    assert decode(b"k8s\0" + kind + encoded(2, body)) == {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {
            "ports": [{"protocol": "TCP", "port": 80, "targetPort": "http"}],
            "selector": {"app": "web"},
            "type": "NodePort",
            "clusterIPs": ["10.96.0.9"],
        },
    }
    refused(lambda: decode(b"k8s\0" + kind + encoded(2, encoded(2, encoded(15, b"x")))), "field 15 of ServiceSpec", code=415)
    refused(
        lambda: decode(b"k8s\0" + encoded(1, encoded(1, b"v1") + encoded(2, b"Secret")) + encoded(2, b"")), "Secret", code=415
    )
    refused(lambda: decode(b"k8s\0" + kind + encoded(2, body)[:-3]), code=415)
