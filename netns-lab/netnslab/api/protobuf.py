"""Objects in Kubernetes' protobuf, as far as kubectl sends them: what `kubectl create namespace`, `service` and `deployment` make.

    "k8s" 0  Unknown{1: TypeMeta{1: apiVersion, 2: kind}, 2: the object}

Everything else comes as JSON. Fields that are not in the tables are refused, so that nothing is lost in silence.
Source: k8s.io/apimachinery, pkg/runtime/serializer/protobuf; the generated.proto of k8s.io/api; protobuf encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from netnslab.api.refusal import Refusal
from netnslab.api.selectors import Raw

MAGIC = b"k8s\0"
Field: TypeAlias = tuple[str, str]
"""A field's name, and its type: a message below, or text, int, bool; ``[]`` in front where there are many, ``{}`` a map of text."""

MESSAGES: dict[str, dict[int, Field]] = {
    "TypeMeta": {1: ("apiVersion", "text"), 2: ("kind", "text")},
    "Namespace": {1: ("metadata", "ObjectMeta"), 2: ("spec", "NamespaceSpec"), 3: ("status", "Skipped")},
    "Service": {1: ("metadata", "ObjectMeta"), 2: ("spec", "ServiceSpec"), 3: ("status", "Skipped")},
    "Deployment": {1: ("metadata", "ObjectMeta"), 2: ("spec", "DeploymentSpec"), 3: ("status", "Skipped")},
    "ObjectMeta": {
        1: ("name", "text"),
        2: ("generateName", "text"),
        3: ("namespace", "text"),
        4: ("selfLink", "text"),
        5: ("uid", "text"),
        6: ("resourceVersion", "text"),
        7: ("generation", "int"),
        8: ("creationTimestamp", "Skipped"),
        11: ("labels", "{}"),
        12: ("annotations", "{}"),
        14: ("finalizers", "[]text"),
        17: ("managedFields", "Skipped"),
    },
    "NamespaceSpec": {1: ("finalizers", "[]text")},
    "ServiceSpec": {
        1: ("ports", "[]ServicePort"),
        2: ("selector", "{}"),
        3: ("clusterIP", "text"),
        4: ("type", "text"),
        5: ("externalIPs", "[]text"),
        7: ("sessionAffinity", "text"),
        8: ("loadBalancerIP", "text"),
        9: ("loadBalancerSourceRanges", "[]text"),
        10: ("externalName", "text"),
        11: ("externalTrafficPolicy", "text"),
        12: ("healthCheckNodePort", "int"),
        13: ("publishNotReadyAddresses", "bool"),
        17: ("ipFamilyPolicy", "text"),
        18: ("clusterIPs", "[]text"),
        19: ("ipFamilies", "[]text"),
        20: ("allocateLoadBalancerNodePorts", "bool"),
        21: ("loadBalancerClass", "text"),
        22: ("internalTrafficPolicy", "text"),
        23: ("trafficDistribution", "text"),
    },
    "ServicePort": {
        1: ("name", "text"),
        2: ("protocol", "text"),
        3: ("port", "int"),
        4: ("targetPort", "IntOrString"),
        5: ("nodePort", "int"),
        6: ("appProtocol", "text"),
    },
    "IntOrString": {1: ("type", "int"), 2: ("intVal", "int"), 3: ("strVal", "text")},
    "DeploymentSpec": {
        1: ("replicas", "int"),
        2: ("selector", "LabelSelector"),
        3: ("template", "PodTemplateSpec"),
        4: ("strategy", "DeploymentStrategy"),
        5: ("minReadySeconds", "int"),
        6: ("revisionHistoryLimit", "int"),
        7: ("paused", "bool"),
    },
    "DeploymentStrategy": {1: ("type", "text"), 2: ("rollingUpdate", "RollingUpdate")},
    "RollingUpdate": {1: ("maxUnavailable", "IntOrString"), 2: ("maxSurge", "IntOrString")},
    "LabelSelector": {1: ("matchLabels", "{}")},
    "PodTemplateSpec": {1: ("metadata", "ObjectMeta"), 2: ("spec", "PodSpec")},
    "PodSpec": {
        2: ("containers", "[]Container"),
        3: ("restartPolicy", "text"),
        4: ("terminationGracePeriodSeconds", "int"),
        6: ("dnsPolicy", "text"),
        7: ("nodeSelector", "{}"),
        8: ("serviceAccountName", "text"),
        9: ("serviceAccount", "text"),
        10: ("nodeName", "text"),
        11: ("hostNetwork", "bool"),
        12: ("hostPID", "bool"),
        13: ("hostIPC", "bool"),
        14: ("securityContext", "Skipped"),
        16: ("hostname", "text"),
        17: ("subdomain", "text"),
        19: ("schedulerName", "text"),
        24: ("priorityClassName", "text"),
    },
    "Container": {
        1: ("name", "text"),
        2: ("image", "text"),
        3: ("command", "[]text"),
        4: ("args", "[]text"),
        5: ("workingDir", "text"),
        6: ("ports", "[]ContainerPort"),
        8: ("resources", "Skipped"),
        13: ("terminationMessagePath", "text"),
        14: ("imagePullPolicy", "text"),
        16: ("stdin", "bool"),
        17: ("stdinOnce", "bool"),
        18: ("tty", "bool"),
        20: ("terminationMessagePolicy", "text"),
    },
    "ContainerPort": {
        1: ("name", "text"),
        2: ("hostPort", "int"),
        3: ("containerPort", "int"),
        4: ("protocol", "text"),
        5: ("hostIP", "text"),
    },
    "{}": {1: ("key", "text"), 2: ("value", "text")},
}


def decode(data: bytes) -> Raw:
    """Return the object as JSON would have it: empty fields are left out. Raises Refusal."""
    try:
        fields = dict(_fields(data.removeprefix(MAGIC)))
        about = _message("TypeMeta", fields[1])
        if about["kind"] not in {"Namespace", "Service", "Deployment"}:
            raise _unread(f"a {about['kind']}")
        return {**about, **_message(about["kind"], fields[2])}
    except (KeyError, IndexError, UnicodeDecodeError, TypeError) as error:
        raise _unread(f"this ({error})") from error


def _unread(what: str) -> Refusal:
    words = f"the lab's API server cannot read {what} in protobuf; a file works: kubectl apply -f"
    return Refusal(415, "UnsupportedMediaType", words)


def _message(name: str, data: bytes) -> Raw:
    found: Raw = {}
    for number, value in _fields(data):
        if number not in MESSAGES[name]:
            raise _unread(f"field {number} of {name}")
        field, kind = MESSAGES[name][number]
        if kind == "{}":
            entry = _message("{}", value)
            found.setdefault(field, {})[entry.get("key", "")] = entry.get("value", "")
        elif kind.startswith("[]"):
            found.setdefault(field, []).append(_value(kind.removeprefix("[]"), value))
        elif kind != "Skipped":
            one = _value(kind, value)
            if one not in ("", {}, 0, False) or (kind == "int" and name == "DeploymentSpec"):  # no replicas is not one
                found[field] = one
    return found


def _value(kind: str, value: Any) -> Any:
    match kind:
        case "text":
            return value.decode()
        case "int":
            return value - (1 << 64) if value >> 63 else value
        case "bool":
            return bool(value)
        case "IntOrString":
            said = _message(kind, value)
            return said.get("strVal", "") if said.get("type") else said.get("intVal", 0)
        case _:
            return _message(kind, value)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield each field's number and value: an int, or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            number, at = _varint(data, at)
            yield tag >> 3, number
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise IndexError("cut off")
            yield tag >> 3, data[at : at + length]
            at += length
        else:
            raise TypeError(f"wire type {tag & 7}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
