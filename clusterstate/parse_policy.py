"""NetworkPolicy: from the wire to a checked value, with the API server's defaults filled in.

A missing, null or empty list mean the same everywhere; only an empty *object* says something (``podSelector: {}`` is every pod).

    policyTypes missing      Ingress, and Egress where there are egress rules
    ports[].protocol missing TCP
    podSelector missing      {}

What is wrong in a policy closes, and never opens: a rule with a fault lets nothing through, policyTypes with one are both, a
podSelector with one selects every pod of the namespace, and a policy of which nothing can be made isolates its pods.

What a selector selects and what a rule allows is for ``netpolicy``.
Source: Kubernetes pkg/apis/networking/v1/defaults.go and validation/validation.go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from clusterstate import fields, wire
from clusterstate.faults import Fault, shown
from clusterstate.fields import Subject
from clusterstate.objects import (
    IPBlock,
    IPNetwork,
    LabelSelector,
    NetworkPolicy,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Requirement,
)

Operator = Literal["In", "NotIn", "Exists", "DoesNotExist"]
_OPERATORS: dict[str, Operator] = {"In": "In", "NotIn": "NotIn", "Exists": "Exists", "DoesNotExist": "DoesNotExist"}
_EVERYTHING = LabelSelector()
NOBODY = PolicyPeer(LabelSelector((Requirement("nodeplane.dev/nobody", "In", ()),)))
"""A peer that nobody is: no label has one of no values."""


MOST_RULES = 5000
"""In one direction of one policy."""


def parse_policy(w: wire.NetworkPolicy, at: Subject) -> tuple[NetworkPolicy, ...]:
    """Return the NetworkPolicy, closed where it has a fault."""
    spec = w.spec or wire.PolicySpec()
    ingress, egress = _isolates(spec.policy_types, bool(spec.egress), at.skipped)
    return (
        NetworkPolicy(
            namespace=at.namespace,
            name=at.name,
            pod_selector=_subject(spec.pod_selector, at.skipped),
            isolates_ingress=ingress,
            isolates_egress=egress,
            ingress=_rules("spec.ingress", "from", spec.ingress or (), at.skipped),
            egress=_rules("spec.egress", "to", spec.egress or (), at.skipped),
        ),
    )


def closed_policy(raw: Any, at: Subject) -> tuple[NetworkPolicy, ...]:
    """Return what stands in for a policy whose fields have wrong types: its pods, as far as it says which, let nothing through."""
    spec = raw.get("spec") if isinstance(raw, Mapping) else None
    stated = spec.get("podSelector") if isinstance(spec, Mapping) else None
    try:
        chosen = selector("", msgspec.convert(stated, wire.Selector | None)) or _EVERYTHING
    except (msgspec.ValidationError, Fault):
        chosen = _EVERYTHING
    types = spec.get("policyTypes") if isinstance(spec, Mapping) else None
    only = types[0] if isinstance(types, list) and len(types) == 1 else None
    return (NetworkPolicy(at.namespace, at.name, chosen, only != "Egress", only != "Ingress"),)


def _isolates(stated: list[str] | None, has_egress: bool, faults: list[Fault]) -> tuple[bool, bool]:
    """Return whether ingress and egress are isolated."""
    types = stated or (["Ingress", "Egress"] if has_egress else ["Ingress"])
    for i, kind in enumerate(types):
        try:
            fields.one_of(f"spec.policyTypes[{i}]", kind, ("Ingress", "Egress"))
        except Fault as fault:
            faults.append(Fault(fault.path, f"{fault.reason}; its pods are isolated in both"))
            return True, True
    return "Ingress" in types, "Egress" in types


def _subject(stated: wire.Selector | None, faults: list[Fault]) -> LabelSelector:
    try:
        return selector("spec.podSelector", stated) or _EVERYTHING
    except Fault as fault:
        faults.append(Fault(fault.path, f"{fault.reason}; every pod of the namespace is isolated"))
        return _EVERYTHING


def _rules(
    path: str, side: str, stated: Sequence[wire.IngressRule | wire.EgressRule], faults: list[Fault]
) -> tuple[PolicyRule, ...]:
    """Return the rules that can be used."""
    if len(stated) > MOST_RULES:
        faults.append(
            Fault(path, f"must hold at most {MOST_RULES} rules, holds {len(stated)}; none of them lets anything through")
        )
        return ()
    found = []
    for i, rule in enumerate(stated):
        try:
            found.append(_rule(f"{path}[{i}]", side, rule))
        except Fault as fault:
            faults.append(Fault(fault.path, f"{fault.reason}; the rule lets nothing through"))
            # It keeps its place, so that those behind it keep their numbers.
            found.append(PolicyRule((NOBODY,)))
    return tuple(found)


def _rule(path: str, side: str, w: wire.IngressRule | wire.EgressRule) -> PolicyRule:
    peers = [_peer(f"{path}.{side}[{i}]", peer) for i, peer in enumerate(w.peers or ())]
    ports = [_port(f"{path}.ports[{i}]", port) for i, port in enumerate(w.ports or ())]
    return PolicyRule(tuple(peers), tuple(ports))


def _peer(path: str, w: wire.Peer) -> PolicyPeer:
    """Return a peer: an address block, or selectors, never both and never nothing (which would be everybody)."""
    pods = selector(f"{path}.podSelector", w.pod_selector)
    namespaces = selector(f"{path}.namespaceSelector", w.namespace_selector)
    if w.ip_block is None:
        if pods is None and namespaces is None:
            raise Fault(path, "must state a podSelector, a namespaceSelector or an ipBlock")
        return PolicyPeer(pods, namespaces)
    if pods is not None or namespaces is not None:
        raise Fault(f"{path}.ipBlock", "must not stand beside a podSelector or namespaceSelector")
    return PolicyPeer(ip_block=_block(f"{path}.ipBlock", w.ip_block))


def _block(path: str, w: wire.IPBlock) -> IPBlock:
    whole = fields.cidr(f"{path}.cidr", w.cidr)
    excepts = [fields.cidr(f"{path}.except[{i}]", text) for i, text in enumerate(w.excepts or ())]
    for i, part in enumerate(excepts):
        if not _inside(part, whole):
            raise Fault(f"{path}.except[{i}]", f"must be a part of {whole} and smaller, is {shown(str(part))}")
    return IPBlock(whole, tuple(excepts))


def _inside(part: IPNetwork, whole: IPNetwork) -> bool:
    """Tell a strict subset, by number: ``subnet_of`` raises for another family."""
    if part.version != whole.version or part.prefixlen <= whole.prefixlen:
        return False
    return part.network_address in whole


def _port(path: str, w: wire.PolicyPort) -> PolicyPort:
    """Return a port: none (all of the protocol), a number, a name, or a range."""
    protocol = fields.protocol(f"{path}.protocol", w.protocol)
    port = w.port
    if isinstance(port, int):
        fields.number(f"{path}.port", port, 1, 65535)
    elif port is not None:
        fields.label_name(f"{path}.port", port)
    if w.end_port is None:
        return PolicyPort(protocol, port)
    if not isinstance(port, int):
        raise Fault(f"{path}.endPort", f"must stand beside a port that is a number, is {w.end_port}")
    return PolicyPort(protocol, port, fields.number(f"{path}.endPort", w.end_port, port, 65535))


# -- selectors -------------------------------------------------------------------------------------------------------


def selector(path: str, w: wire.Selector | None) -> LabelSelector | None:
    """Return a selector, ``matchLabels`` first and by key; None where there is none."""
    if w is None:
        return None
    stated = [Requirement(key, "In", (value,)) for key, value in sorted((w.match_labels or {}).items())]
    expressions = [_requirement(f"{path}.matchExpressions[{i}]", e) for i, e in enumerate(w.match_expressions or ())]
    return LabelSelector((*stated, *expressions))


def _requirement(path: str, w: wire.Requirement) -> Requirement:
    if not w.key:
        raise Fault(f"{path}.key", "must be given")
    fields.one_of(f"{path}.operator", w.operator or "", _OPERATORS)
    operator = _OPERATORS[w.operator or ""]
    if operator in ("In", "NotIn") and not w.values:
        raise Fault(f"{path}.values", f"must hold a value for {operator}")
    if operator in ("Exists", "DoesNotExist") and w.values:
        raise Fault(f"{path}.values", f"must be empty for {operator}, is {shown(w.values)}")
    return Requirement(w.key, operator, tuple(w.values or ()))
