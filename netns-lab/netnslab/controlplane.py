"""A control plane in one pure function: objects as people write them in, objects as the API server would show them out.

    given objects --.                  scheduler:            spec.nodeName
    topology -------+--> complete() -- kubelet:              status.podIPs, phase, Ready
    memory ---------'        |         service registry:     clusterIPs, nodePorts, healthCheckNodePort
                             |         slice controller:     EndpointSlices from selectors
                             v         namespace lifecycle:  Namespaces that are spoken of
              objects for the agents, and the memory of what was dealt out

What objects state is kept, whatever this would have chosen. Two that state the same address or port are refused, as the API
server does it. Creating the pods' namespaces is for ``lab``; whether an object can be read at all was checked by ``given``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from ipaddress import ip_address, ip_network
from typing import Any

import msgspec

from clusterstate.objects import ObjectRef
from netnslab.endpoints import MADE_BY, SERVICE_LABEL, is_selected, slices_for
from netnslab.errors import LabInputError
from netnslab.given import Given, Raw
from netnslab.memory import Memory, PodPlace, ServicePlace, free_cluster_ip, free_node_port, next_pod_ip
from netnslab.topology import LabNode, Topology

ZONE, HOSTNAME = "topology.kubernetes.io/zone", "kubernetes.io/hostname"
FAMILY: dict[int, str] = {4: "IPv4", 6: "IPv6"}


class Completed(msgspec.Struct):
    """Every object an agent should see, by reference, and the memory to hand in next time."""

    objects: Given
    memory: Memory


def complete(given: Given, topology: Topology, memory: Memory) -> Completed:
    """Fill in what a control plane fills in. Nothing handed in is changed. Raises LabInputError."""
    plane = _ControlPlane(copy.deepcopy(given), topology, copy.deepcopy(memory))
    plane.nodes()
    plane.pods()
    plane.services()
    plane.slices()
    plane.service_cidr()
    plane.namespaces()
    return Completed(plane.objects, plane.memory)


def unplaceable(given: Given, topology: Topology, memory: Memory) -> dict[ObjectRef, str]:
    """Return the pods for which there is no node, and why: an API server takes such a pod, and lets it wait."""
    plane = _ControlPlane({ref: raw for ref, raw in given.items() if ref.kind in {"Node", "Pod"}}, topology, memory)
    plane.nodes()
    return plane.unplaceable()


class _ControlPlane:
    """One run: ``given`` is used up, ``objects`` grows."""

    def __init__(self, given: Given, topology: Topology, memory: Memory) -> None:
        self.given, self.topology, self.memory = given, topology, memory
        self.objects: Given = {}

    def _of(self, kind: str) -> list[tuple[ObjectRef, Raw]]:
        return [(ref, raw) for ref, raw in self.given.items() if ref.kind == kind]

    # -- nodes -------------------------------------------------------------------------------------------------------

    def nodes(self) -> None:
        """Make the Node objects of the topology, with what given ones add."""
        for ref, _ in self._of("Node"):
            if self.topology.node(ref.name) is None:
                names = ", ".join(n.name for n in self.topology.nodes)
                raise _wrong(ref, "metadata.name", f"the lab's nodes are {names}: nodes are fixed when a lab comes up")
        for node in self.topology.nodes:
            ref = ObjectRef("Node", "", node.name)
            if node.name not in self.memory.removed_nodes:
                self.objects[ref] = _node(node, self.given.get(ref, {}), ref)

    @property
    def _zones(self) -> dict[str, str]:
        nodes = (raw for ref, raw in self.objects.items() if ref.kind == "Node")
        return {raw["metadata"]["name"]: raw["metadata"]["labels"].get(ZONE, "") for raw in nodes}

    # -- pods --------------------------------------------------------------------------------------------------------

    def pods(self) -> None:
        """Schedule each pod and give it addresses and a status."""
        pods, before = self._of("Pod"), self.memory.pods
        self.memory.pods = {}
        stated = {key: _stated_ips(raw) for (_, ns, name), raw in pods for key in [f"{ns}/{name}"]}
        _no_two("status.podIPs", ((ref, ip) for ref, raw in pods if not _on_host(raw) for ip in _stated_ips(raw)))
        taken = {ip for ips in stated.values() for ip in ips} | {
            ip for key, place in before.items() if key in stated for ip in place.ips
        }
        load = Counter(place.node for key, place in before.items() if key in stated)
        load.update(n for (_, ns, name), raw in pods if f"{ns}/{name}" not in before and (n := _node_name(raw)))
        for ref, raw in pods:
            key = f"{ref.namespace}/{ref.name}"
            old = before.get(key)
            node = self._schedule(ref, raw, old, load)
            if _on_host(raw):
                ips, own = node.ips, []
            else:
                own = ips = stated[key] or self._addresses(node, old, taken)
            self.memory.pods[key] = PodPlace(node.name, list(own))
            self.objects[ref] = _finished_pod(raw, ref, node, ips)

    def _schedule(self, ref: ObjectRef, raw: Raw, old: PodPlace | None, load: Counter[str]) -> LabNode:
        """Return a pod's node: the one it states, else the one it had, else the one with the fewest pods."""
        stated = _node_name(raw)
        if stated:
            node = self.topology.node(stated)
            if node is None or ObjectRef("Node", "", stated) not in self.objects:
                raise _wrong(ref, "spec.nodeName", f"must be a node of the lab ({', '.join(self._zones)}), is {stated!r}")
            return node
        selector = (raw.get("spec") or {}).get("nodeSelector") or {}
        fitting = [
            n
            for n in self.topology.nodes
            if (raw_node := self.objects.get(ObjectRef("Node", "", n.name)))
            and is_selected(selector, raw_node["metadata"]["labels"])
            and (not raw_node["spec"].get("unschedulable") or (old is not None and old.node == n.name))
        ]
        if not fitting:
            cordoned = ", or it takes no new pods" if any(self._cordoned()) else ""
            raise _wrong(ref, "spec.nodeSelector", f"no node has these labels: {selector}{cordoned}")
        if old is not None and any(n.name == old.node for n in fitting):
            return next(n for n in fitting if n.name == old.node)
        best = min(fitting, key=lambda n: load[n.name])
        load[best.name] += 1
        return best

    def _cordoned(self) -> Iterator[str]:
        return (ref.name for ref, raw in self.objects.items() if ref.kind == "Node" and raw["spec"].get("unschedulable"))

    def unplaceable(self) -> dict[ObjectRef, str]:
        """Return why pods cannot be placed, each by itself."""
        found = {}
        for ref, raw in self._of("Pod"):
            place = self.memory.pods.get(f"{ref.namespace}/{ref.name}")
            try:
                self._schedule(ref, raw, place, Counter())
            except LabInputError as error:
                found[ref] = str(error)
        return found

    def _addresses(self, node: LabNode, old: PodPlace | None, taken: set[str]) -> list[str]:
        """Return the pod's addresses as they were if it stayed on its node, else new ones."""
        if old is not None and old.node == node.name and old.ips:
            return old.ips
        found = []
        for cidr in sorted(node.pod_cidrs, key=lambda c: self.topology.families.index(ip_network(c).version)):
            found.append(next_pod_ip(self.memory, cidr, taken))
            taken.add(found[-1])
        return found

    # -- Services ----------------------------------------------------------------------------------------------------

    def services(self) -> None:
        """Give each Service its ClusterIPs and NodePorts."""
        services, before = self._of("Service"), self.memory.services
        _no_two("spec.clusterIPs", ((ref, ip) for ref, raw in services for ip in _stated_cluster_ips(raw)))
        _no_two("spec.ports[].nodePort", ((ref, port) for ref, raw in services for port in _stated_node_ports(raw)))
        kept = [place for key, place in before.items() if ObjectRef("Service", *key.split("/")) in self.given]
        ips = {ip for p in kept for ip in p.cluster_ips} | {ip for _, raw in services for ip in _stated_cluster_ips(raw)}
        ports = {n for p in kept for n in (*p.node_ports.values(), p.health_port)}
        ports |= {number for _, raw in services for _, number in _stated_node_ports(raw)}
        self.memory.services = {}
        for ref, raw in services:
            key = f"{ref.namespace}/{ref.name}"
            place = before.get(key, ServicePlace([], {}))
            place = self._finish_service(ref, raw, place, ips, ports)
            self.memory.services[key] = place
            self.objects[ref] = raw

    def _finish_service(self, ref: ObjectRef, raw: Raw, old: ServicePlace, ips: set[str], ports: set[int]) -> ServicePlace:
        raw["metadata"].setdefault("namespace", ref.namespace)
        spec: Raw = raw.setdefault("spec", {})
        kind = spec.setdefault("type", "ClusterIP")
        if kind == "ExternalName":
            return ServicePlace([], {})
        families = self._families(ref, spec)
        spec["ipFamilies"] = [FAMILY[f] for f in families]
        place = ServicePlace([], {})
        if spec.get("clusterIP") == "None":
            spec["clusterIPs"] = ["None"]
        else:
            place.cluster_ips = self._cluster_ips(raw, families, old, ips)
            spec["clusterIP"], spec["clusterIPs"] = place.cluster_ips[0], place.cluster_ips
        wants_ports = kind == "NodePort" or (kind == "LoadBalancer" and spec.get("allocateLoadBalancerNodePorts", True))
        for port in spec.get("ports") or []:
            name = f"{port.get('protocol') or 'TCP'}/{port['port']}"
            if wants_ports and not port.get("nodePort"):
                port["nodePort"] = old.node_ports.get(name) or free_node_port(ports)
            if port.get("nodePort"):
                ports.add(port["nodePort"])
                place.node_ports[name] = port["nodePort"]
        if kind == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local" and not spec.get("healthCheckNodePort"):
            spec["healthCheckNodePort"] = old.health_port or free_node_port(ports)
        place.health_port = spec.get("healthCheckNodePort") or 0
        ports.add(place.health_port)
        return place

    def _families(self, ref: ObjectRef, spec: Raw) -> list[int]:
        """Return a Service's families: stated, or by its addresses and policy; the cluster's first is the default."""
        have: list[int] = [ip_network(c).version for c in self.topology.cluster.service_cidrs]
        stated: list[int] = [6 if f == "IPv6" else 4 for f in spec.get("ipFamilies") or []]
        stated = stated or [ip_address(ip).version for ip in _stated_cluster_ips({"spec": spec})]
        policy = spec.setdefault("ipFamilyPolicy", "RequireDualStack" if len(stated) > 1 else "SingleStack")
        missing = [f for f in stated if f not in have]
        if missing:
            raise _wrong(ref, "spec.ipFamilies", f"the lab has no {FAMILY[missing[0]]} Service CIDR")
        if policy == "SingleStack":
            return stated[:1] or have[:1]
        if policy == "RequireDualStack" and len(have) == 1:
            raise _wrong(ref, "spec.ipFamilyPolicy", f"the lab has only {FAMILY[have[0]]}, is 'RequireDualStack'")
        return [*stated, *(f for f in have if f not in stated)]

    def _cluster_ips(self, raw: Raw, families: list[int], old: ServicePlace, taken: set[str]) -> list[str]:
        found = []
        known: dict[int, str] = {ip_address(ip).version: ip for ip in (*old.cluster_ips, *_stated_cluster_ips(raw))}
        for family in families:
            cidr = next(c for c in self.topology.cluster.service_cidrs if ip_network(c).version == family)
            found.append(known.get(family) or free_cluster_ip(cidr, taken))
            taken.add(found[-1])
        return found

    # -- the rest ----------------------------------------------------------------------------------------------------

    def slices(self) -> None:
        """Make the slices of Services with a selector, unless slices or Endpoints of theirs were given."""
        own = {
            (ref.namespace, (raw["metadata"].get("labels") or {}).get(SERVICE_LABEL, ""))
            for ref, raw in self._of("EndpointSlice")
        } | {(ref.namespace, ref.name) for ref, _ in self._of("Endpoints")}
        pods, zones = [raw for ref, raw in self.objects.items() if ref.kind == "Pod"], self._zones
        for ref, raw in self._of("Service"):
            spec = raw["spec"]
            if spec["type"] == "ExternalName" or not spec.get("selector") or (ref.namespace, ref.name) in own:
                continue
            for one in slices_for(raw, pods, zones):
                self.objects[ObjectRef("EndpointSlice", ref.namespace, one["metadata"]["name"])] = one
        for kind in ("EndpointSlice", "Endpoints", "NetworkPolicy", "ClusterNetworkPolicy", "ServiceCIDR", "Namespace"):
            self.objects.update(self._of(kind))

    def service_cidr(self) -> None:
        """Add the ServiceCIDR that the API server makes of its own range."""
        cidrs = list(self.topology.cluster.service_cidrs)
        raw = {"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}}
        self.objects.setdefault(ObjectRef("ServiceCIDR", "", "kubernetes"), {**raw, "spec": {"cidrs": cidrs}})

    def namespaces(self) -> None:
        """Add the namespaces every cluster has, and those that objects are in."""
        for name in sorted({"default", "kube-system", *(ref.namespace for ref in self.objects if ref.namespace)}):
            ref = ObjectRef("Namespace", "", name)
            raw = self.objects.setdefault(ref, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
            raw["metadata"]["labels"] = {**(raw["metadata"].get("labels") or {}), "kubernetes.io/metadata.name": name}


def is_own(raw: Raw) -> bool:
    """Whether an object was made by ``complete``, or of what it made, and not given."""
    return (raw["metadata"].get("annotations") or {}).items() >= MADE_BY.items()


# -- single objects --------------------------------------------------------------------------------------------------


def _wrong(ref: ObjectRef, field: str, reason: str) -> LabInputError:
    return LabInputError(f"{ref}: {field}: {reason}")


def _node(node: LabNode, given: Raw, ref: ObjectRef) -> Raw:
    """Return a Node as kubelet and the node controllers leave it; a given one may add, but not move the node."""
    metadata, spec, status = (given.get(k) or {} for k in ("metadata", "spec", "status"))
    cidrs = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else node.pod_cidrs)
    addresses = status.get("addresses") or [{"type": "InternalIP", "address": ip} for ip in node.ips]
    stated = [a["address"] for a in addresses if a.get("type") == "InternalIP"]
    if stated and sorted(map(ip_address, stated), key=str) != sorted(map(ip_address, node.ips), key=str):
        raise _wrong(ref, "status.addresses", f"the node has {', '.join(node.ips)}; addresses are fixed when a lab comes up")
    if sorted(cidrs) != sorted(node.pod_cidrs):
        raise _wrong(ref, "spec.podCIDRs", f"the node has {', '.join(node.pod_cidrs)}; podCIDRs are fixed when a lab comes up")
    labels = {HOSTNAME: node.name, **({ZONE: node.zone} if node.zone else {}), **node.labels}
    return {
        **given,
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {**metadata, "name": node.name, "labels": {**labels, **(metadata.get("labels") or {})}},
        "spec": {**spec, "podCIDR": cidrs[0], "podCIDRs": list(cidrs)},
        "status": {"conditions": [{"type": "Ready", "status": "True"}], **status, "addresses": addresses},
    }


def _finished_pod(raw: Raw, ref: ObjectRef, node: LabNode, ips: list[str]) -> Raw:
    raw["metadata"].setdefault("namespace", ref.namespace)
    raw["spec"] = {**(raw.get("spec") or {}), "nodeName": node.name}
    status = raw["status"] = {"phase": "Running", **(raw.get("status") or {})}
    status |= {"hostIP": node.ips[0], "podIP": ips[0], "podIPs": [{"ip": ip} for ip in ips]}
    conditions = status.get("conditions") or []
    if not any(c.get("type") == "Ready" for c in conditions):
        running = "True" if status["phase"] == "Running" else "False"
        status["conditions"] = [*conditions, {"type": "Ready", "status": running}]
    return raw


def _on_host(pod: Raw) -> bool:
    return bool((pod.get("spec") or {}).get("hostNetwork"))


def _node_name(pod: Raw) -> str:
    return str((pod.get("spec") or {}).get("nodeName") or "")


def _stated_ips(pod: Raw) -> list[str]:
    status = pod.get("status") or {}
    stated = [e["ip"] for e in status.get("podIPs") or [] if e.get("ip")]
    return stated or ([status["podIP"]] if status.get("podIP") else [])


def _stated_cluster_ips(service: Raw) -> list[str]:
    spec = service.get("spec") or {}
    stated = spec.get("clusterIPs") or [spec.get("clusterIP")]
    return [ip for ip in stated if ip and ip != "None"]


def _stated_node_ports(service: Raw) -> list[tuple[str, int]]:
    ports = (service.get("spec") or {}).get("ports") or []
    return [(p.get("protocol") or "TCP", p["nodePort"]) for p in ports if p.get("nodePort")]


def _no_two(field: str, stated: Iterable[tuple[ObjectRef, Any]]) -> None:
    """Refuse a value that two objects state."""
    seen: dict[Any, ObjectRef] = {}
    for ref, value in stated:
        if value in seen:
            shown = value if isinstance(value, str) else f"{value[1]}/{value[0]}"
            raise _wrong(ref, field, f"{shown} is that of {seen[value]} already")
        seen[value] = ref
