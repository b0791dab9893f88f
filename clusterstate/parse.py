"""Bytes in, checked objects out: finds the objects in a document and hands each to the parser of its kind.

    document (JSON, or YAML with any number of documents)
      +- object, List, ServiceList ...        lists may hold lists
           +- kind and apiVersion we know ->  wire.py (types)  ->  parse_*.py (values)  ->  objects.py
           +- any other kind              ->  silently nothing: a directory of manifests holds Deployments too

Nothing here raises for bad input: one bad object is left out with an ObjectError, the others stay. The quick way decodes an object
straight into its wire type; only where that fails is it decoded again generically, to name the field and the value.

Where objects come from and which of two namesakes counts is for ``sources``. Source of the kinds: Kubernetes API v1.36.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from sys import intern
from typing import Any, TypeAlias

import msgspec
import yaml

from clusterstate import fields, wire
from clusterstate.faults import Fault, shown, type_fault
from clusterstate.objects import KubernetesObject, ObjectRef
from clusterstate.parse_cluster_policy import parse_cluster_policy
from clusterstate.parse_node import parse_namespace, parse_node, parse_pod, parse_service_cidr
from clusterstate.parse_policy import closed_policy, parse_policy
from clusterstate.parse_service import parse_service
from clusterstate.parse_slice import parse_endpoints, parse_slice
from clusterstate.snapshot import ObjectError
from clusterstate.yamltext import load_documents

DEEPEST = 16
"""How many lists may lie inside one another."""
TOGETHER = 32
"""How many objects of a list are decoded in one go: enough to be quick, few enough to be in the processor's cache when looked at."""
_BOM = b"\xef\xbb\xbf"


Made: TypeAlias = tuple[KubernetesObject, ...]
"""What became of one object: itself; the slices of an Endpoints object; nothing for a slice of host names."""


class Parsed(msgspec.Struct, frozen=True):
    """What a document holds: its good objects in stated order, and what is wrong with the others."""

    made: Mapping[ObjectRef, Made]
    errors: tuple[ObjectError, ...]

    @property
    def objects(self) -> tuple[KubernetesObject, ...]:
        """Every object, in order."""
        return tuple([one for made in self.made.values() for one in made])


class Kind(msgspec.Struct, frozen=True):
    """How one kind is read."""

    group: str
    spellings: tuple[str | None, ...]
    namespaced: bool
    check_name: Callable[[str, str], str]
    wire_type: type[wire.AnyKind]
    build: Callable[[Any, fields.Subject], Made]


KINDS: dict[str, Kind] = {
    "Service": Kind("", ("v1", "", None), True, fields.label_name, wire.Service, parse_service),
    "EndpointSlice": Kind(
        "discovery.k8s.io", ("discovery.k8s.io/v1", "", None), True, fields.subdomain_name, wire.EndpointSlice, parse_slice
    ),
    "Endpoints": Kind("", ("v1", "", None), True, fields.subdomain_name, wire.Endpoints, parse_endpoints),
    "Node": Kind("", ("v1", "", None), False, fields.subdomain_name, wire.Node, parse_node),
    "Namespace": Kind("", ("v1", "", None), False, fields.label_name, wire.Namespace, parse_namespace),
    "Pod": Kind("", ("v1", "", None), True, fields.subdomain_name, wire.Pod, parse_pod),
    "ServiceCIDR": Kind(
        "networking.k8s.io",
        ("networking.k8s.io/v1", "networking.k8s.io/v1beta1", "", None),
        False,
        fields.subdomain_name,
        wire.ServiceCIDR,
        parse_service_cidr,
    ),
    "NetworkPolicy": Kind(
        "networking.k8s.io", ("networking.k8s.io/v1", "", None), True, fields.subdomain_name, wire.NetworkPolicy, parse_policy
    ),
    "ClusterNetworkPolicy": Kind(
        "policy.networking.k8s.io",
        ("policy.networking.k8s.io/v1alpha2", "", None),
        False,
        fields.subdomain_name,
        wire.ClusterNetworkPolicy,
        parse_cluster_policy,
    ),
}


class _Head(msgspec.Struct, gc=False):
    """The start of a document: is it a list, and of what."""

    kind: str | None = None
    items: list[msgspec.Raw] | None = None


_HEAD = msgspec.json.Decoder(_Head)
_SEVERAL: msgspec.json.Decoder[list[wire.AnyKind]] = msgspec.json.Decoder(list[wire.AnyKind])
_ANY: msgspec.json.Decoder[wire.AnyKind] = msgspec.json.Decoder(wire.AnyKind)


def parse_document(data: bytes, source: str, is_json: bool) -> Parsed:
    """Parse one file. YAML that begins with a brace is tried as JSON first, which is many times faster."""
    reader = _Reader(source)
    data = data.removeprefix(_BOM)
    if not data or data.isspace():
        reader.refuse(None, Fault("", "is empty: perhaps not yet written"))
    elif is_json or data[:1024].lstrip().startswith(b"{"):
        if not reader.read_json(data, quiet=not is_json):
            reader.read_yaml(data)
    else:
        reader.read_yaml(data)
    return reader.parsed()


def parse_object(raw: Mapping[str, Any], source: str) -> Parsed:
    """Parse one object, or a list, that is decoded already."""
    reader = _Reader(source)
    reader.read_value(raw, "", "", 0)
    return reader.parsed()


class _Reader:
    """Collects the objects and errors of one source."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._made: dict[ObjectRef, Made] = {}
        self._errors: list[ObjectError] = []

    def parsed(self) -> Parsed:
        return Parsed(self._made, tuple(self._errors))

    def refuse(self, ref: ObjectRef | None, fault: Fault, kept: bool = False) -> None:
        self._errors.append(ObjectError(self._source, ref, fault.path, fault.reason, kept))

    # -- documents ---------------------------------------------------------------------------------------------------

    def read_json(self, data: bytes, quiet: bool) -> bool:
        """Read a JSON document. Returns False, with nothing said, where ``quiet`` is set and it is no JSON."""
        try:
            head = _HEAD.decode(data)
        except msgspec.ValidationError:
            self._read_slowly(msgspec.Raw(data), "", "")
            return True
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if quiet:
                return False
            self.refuse(None, Fault("", f"is not JSON: {error}"))
            return True
        if head.items is not None and (head.kind or "").endswith("List"):
            member = (head.kind or "").removesuffix("List")
            for start in range(0, len(head.items), TOGETHER):
                self._read_several(head.items[start : start + TOGETHER], member, start)
        else:
            self._read_raw(msgspec.Raw(data), "", None)
        return True

    def read_yaml(self, data: bytes) -> None:
        """Read each document of a YAML file up to the first that cannot be read."""
        documents = load_documents(data)
        number = 0
        while True:
            number += 1
            try:
                value = next(documents)
            except StopIteration:
                return
            except (yaml.YAMLError, ValueError, RecursionError) as error:
                self.refuse(None, Fault("", f"is not YAML: {_yaml_words(error)}"))
                return
            if value is not None:
                self.read_value(value, "", f"document {number}" if number > 1 else "", 0)

    # -- objects -----------------------------------------------------------------------------------------------------

    def _read_several(self, raws: list[msgspec.Raw], member: str, start: int) -> None:
        """Read neighbours in a list, the first at ``start``: all together, and where one of them is not as usual each by itself."""
        try:
            found = _SEVERAL.decode(b"[" + b",".join(raws) + b"]")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            for i, raw in enumerate(raws, start):
                self._read_raw(raw, member, i)
        else:
            for i, w in enumerate(found, start):
                self._build(type(w).__name__, w, i)

    def _read_raw(self, raw: msgspec.Raw, member: str, index: int | None) -> None:
        """Read one object of JSON: the quick way, and where that fails the thorough one."""
        try:
            found = _ANY.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # a ValidationError is a DecodeError
            self._read_slowly(raw, member, "" if index is None else f"items[{index}]")
        else:
            self._build(type(found).__name__, found, index)

    def _read_slowly(self, raw: msgspec.Raw, member: str, where: str) -> None:
        try:
            value = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.refuse(None, Fault(where, f"is not JSON: {error}"))
            return
        self.read_value(value, member, where, 0)

    def read_value(self, value: Any, member: str, where: str, depth: int) -> None:
        """Read one decoded object or list; ``member`` is the kind of those in the list around it, where it says one."""
        if not isinstance(value, Mapping):
            self.refuse(None, Fault(where, f"must be an object, is {shown(value)}"))
            return
        kind = value.get("kind", member)
        if not isinstance(kind, str) or not kind:
            self.refuse(None, Fault(f"{where}.kind".removeprefix("."), f"must be the kind of an object, is {shown(kind)}"))
        elif kind.endswith("List") and "items" in value:
            self._read_list(value["items"], kind.removesuffix("List"), where, depth + 1)
        elif kind in KINDS and self._is_ours(kind, value):
            try:
                self._build(kind, msgspec.convert(value, KINDS[kind].wire_type), where)
            except (msgspec.ValidationError, RecursionError) as error:
                self._refuse_type(kind, value, type_fault(str(error), value))

    def _refuse_type(self, kind: str, value: Mapping[str, Any], fault: Fault) -> None:
        """Refuse an object with a field of a wrong type; of a NetworkPolicy there remains what isolates its pods.

        Of a ClusterNetworkPolicy that can only be a field of its metadata, which mean nothing to its rules.
        """
        ref = _ref(kind, value)
        if kind == "ClusterNetworkPolicy" and ref is not None:
            self._build(kind, wire.ClusterNetworkPolicy(None, wire.Metadata(ref.name), value.get("spec")), None)
            self.refuse(ref, Fault(fault.path, f"{fault.reason}; its rules stand"), kept=True)
            return
        if kind != "NetworkPolicy" or ref is None or ref in self._made:
            self.refuse(ref, fault)
            return
        self._made[ref] = closed_policy(value, fields.Subject(ref.namespace, ref.name, []))
        self.refuse(ref, Fault(fault.path, f"{fault.reason}; its pods are isolated"), kept=True)

    def _read_list(self, items: Any, member: str, where: str, depth: int) -> None:
        path = f"{where}.items".removeprefix(".")
        if items is None:
            return
        if not isinstance(items, list) or depth > DEEPEST:
            self.refuse(None, Fault(path, f"must be a list, at most {DEEPEST} inside one another, is {shown(items)}"))
            return
        for i, item in enumerate(items):
            self.read_value(item, member, f"{path}[{i}]", depth)

    def _is_ours(self, kind: str, value: Mapping[str, Any]) -> bool:
        """Tell whether an apiVersion is the kind's; complains where only the version is another."""
        version = value.get("apiVersion")
        if version is not None and not isinstance(version, str):
            self.refuse(_ref(kind, value), Fault("apiVersion", f"must be a string, is {shown(version)}"))
            return False
        try:
            return _known_version(kind, version)
        except Fault as fault:
            self.refuse(_ref(kind, value), fault)
            return False

    def _build(self, kind: str, w: wire.AnyKind, where: str | int | None) -> None:
        """Check one typed object and keep what becomes of it; ``where`` is its path or its index in a list."""
        known, metadata = KINDS[kind], w.metadata
        if metadata is None or not metadata.name:
            path = f"items[{where}]" if isinstance(where, int) else where or ""
            self.refuse(None, Fault(f"{path}.metadata.name".removeprefix("."), f"must be given for a {kind}"))
            return
        stated = intern(metadata.namespace or "default") if known.namespaced else ""
        ref = ObjectRef(kind, stated, metadata.name)
        skipped: list[Fault] = []
        try:
            if w.api_version not in known.spellings and not _known_version(kind, w.api_version):
                return
            namespace = _namespace(stated) if stated else ""
            name = known.check_name("metadata.name", metadata.name)
            made = known.build(w, fields.Subject(namespace, name, skipped))
        except Fault as fault:
            self.refuse(ref, fault)
            return
        if ref in self._made:
            self.refuse(ref, Fault("", "is here twice: the first one counts"))
            return
        self._made[ref] = made
        for left_out in skipped:
            self.refuse(ref, left_out, kept=True)


@lru_cache(maxsize=4096)
def _namespace(stated: str) -> str:
    """Return the name of a namespace; there are few, so each is looked at once."""
    return fields.label_name("metadata.namespace", stated)


def _known_version(kind: str, stated: str | None) -> bool:
    """Tell whether an object is of the API group we know a kind from (Knative has a Service, too). Absent is yes."""
    known = KINDS[kind]
    if stated in known.spellings:
        return True
    if (stated or "").rpartition("/")[0] != known.group:
        return False
    raise Fault("apiVersion", f"must be {' or '.join(filter(None, known.spellings))}, is {shown(stated)}")


def _ref(kind: str, value: Mapping[str, Any]) -> ObjectRef | None:
    """Return the reference of an object of which only part is right."""
    metadata = value.get("metadata")
    name, namespace = (metadata.get("name"), metadata.get("namespace")) if isinstance(metadata, Mapping) else (None, None)
    if not isinstance(name, str) or not name:
        return None
    if not KINDS[kind].namespaced:
        return ObjectRef(kind, "", name)
    return ObjectRef(kind, namespace if isinstance(namespace, str) and namespace else "default", name)


def _yaml_words(error: Exception) -> str:
    """Return a YAML error on one line, with its line number."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    return " ".join(str(error).split())
