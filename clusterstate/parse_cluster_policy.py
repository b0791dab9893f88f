"""ClusterNetworkPolicy: from the wire to a checked value. What is wrong in one closes, and never opens.

    a rule with a fault            Accept: accepts nothing.  Deny, Pass, or no action that is known: denies everything
    tier, priority or subject      Admin, the first, every pod; and the policy accepts nothing, and denies what it would pass
    more rules than there may be   the same for that direction

The first is what the API asks of everybody who meets a peer he does not know; the others follow from it: whatever was meant, no
packet gets through that would not have. Nothing is passed over, for a field that is skipped could be the one that restricts.

Peers of a later channel of the API (``nodes``, ``domainNames``) are such faults. What a rule means is for ``netpolicy``.
Source: sigs.k8s.io/network-policy-api v0.2.0, apis/v1alpha2; NPEP-187 (protocols).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from clusterstate import fields, wire
from clusterstate.faults import Fault, shown, type_fault
from clusterstate.fields import Subject
from clusterstate.objects import (
    Action,
    ClusterNetworkPolicy,
    ClusterPolicyRule,
    IPBlock,
    LabelSelector,
    PolicyPeer,
    PolicyPort,
    Protocol,
    Tier,
)
from clusterstate.parse_policy import NOBODY, selector

MOST = 25
"""Rules in a direction, peers and protocols of a rule, networks of a peer."""
LONGEST_NAME = 100
LAST_PRIORITY = 1000
_FIELDS = ("tier", "priority", "subject", "ingress", "egress")
_TIERS: dict[str, Tier] = {"Admin": "Admin", "Baseline": "Baseline"}
_ACTIONS: dict[str, Action] = {"Accept": "Accept", "Deny": "Deny", "Pass": "Pass"}
_PROTOCOLS: tuple[Protocol, ...] = ("TCP", "UDP", "SCTP")
_EVERY_POD = PolicyPeer(LabelSelector(), LabelSelector())
_CLOSED = "the policy accepts nothing, and denies what it would pass"

_Value = TypeVar("_Value")


def parse_cluster_policy(w: wire.ClusterNetworkPolicy, at: Subject) -> tuple[ClusterNetworkPolicy, ...]:
    """Return the ClusterNetworkPolicy, closed where it has a fault."""
    reader = _Reader(at.skipped)
    spec = reader.mapping(w.spec)
    tier: Tier = reader.part("tier", lambda: _tier(spec.get("tier")), "Admin", "it is taken for Admin")
    priority = reader.part("priority", lambda: _priority(spec.get("priority")), 0, "it comes first")
    subject = reader.part("subject", lambda: _subject(spec.get("subject")), _EVERY_POD, "it is about every pod")
    ingress = reader.rules("ingress", spec.get("ingress"))
    egress = reader.rules("egress", spec.get("egress"))
    return (ClusterNetworkPolicy(at.name, tier, priority, subject, ingress, egress),)


class _Reader:
    """Reads one policy; notes faults, and whether one of them closes the whole."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = faults
        self._closed = False

    def mapping(self, spec: Any) -> Mapping[str, Any]:
        """Return ``spec`` if it is an object, and close the policy for each field that is not known."""
        if not isinstance(spec, Mapping):
            self._close(Fault("spec", f"must be an object, is {shown(spec)}"), "it has no rules")
            return {}
        for key in spec:
            if key not in _FIELDS:
                self._close(Fault(f"spec.{key}", f"is not known here, is {shown(spec[key])}"), _CLOSED)
        return spec

    def part(self, name: str, read: Callable[[], _Value], instead: _Value, means: str) -> _Value:
        """Return what ``read`` makes of a field of ``spec``, or what stands in for it."""
        try:
            found = read()
        except Fault as fault:
            self._close(fault.under(f"spec.{name}"), f"{means}, and {_CLOSED}")
            return instead
        return found

    def rules(self, direction: str, stated: Any) -> tuple[ClusterPolicyRule, ...]:
        """Return the rules of a direction, each in its place."""
        path, closed = f"spec.{direction}", self._closed
        if stated is None:
            return ()
        if not isinstance(stated, Sequence) or isinstance(stated, str):
            self._faults.append(Fault(path, f"must be a list, is {shown(stated)}; everything is denied"))
            return (ClusterPolicyRule(action="Deny"),)
        if len(stated) > MOST:
            self._faults.append(Fault(path, f"must hold at most {MOST} rules, holds {len(stated)}; {_CLOSED}"))
            closed = True
        found = [self._rule(f"{path}[{i}]", direction, raw) for i, raw in enumerate(stated)]
        return tuple(map(_closed, found) if closed else found)

    def _rule(self, path: str, direction: str, raw: Any) -> ClusterPolicyRule:
        try:
            rule = _rule(direction, raw)
        except Fault as fault:
            inside = fault.under(path) if not fault.path.startswith("[") else Fault(f"{path}{fault.path}", fault.reason)
            if isinstance(raw, Mapping) and raw.get("action") == "Accept":
                self._faults.append(Fault(inside.path, f"{inside.reason}; the rule accepts nothing"))
                return ClusterPolicyRule((NOBODY,))
            self._faults.append(Fault(inside.path, f"{inside.reason}; the rule denies everything"))
            return ClusterPolicyRule(action="Deny")
        if len(rule.name) > LONGEST_NAME:
            reason = f"must be at most {LONGEST_NAME} characters, is {shown(rule.name)}; it is cut"
            self._faults.append(Fault(f"{path}.name", reason))
            return msgspec.structs.replace(rule, name=rule.name[:LONGEST_NAME])
        return rule

    def _close(self, fault: Fault, consequence: str) -> None:
        self._closed = True
        self._faults.append(Fault(fault.path, f"{fault.reason}; {consequence}"))


def _closed(rule: ClusterPolicyRule) -> ClusterPolicyRule:
    """Return a rule of a policy of which is not known when or for whom it is meant."""
    if rule.action == "Accept":
        return ClusterPolicyRule((NOBODY,))
    return msgspec.structs.replace(rule, action="Deny")


def _tier(stated: Any) -> Tier:
    fields.one_of("", stated if isinstance(stated, str) else "", _TIERS)
    return _TIERS[stated]


def _priority(stated: Any) -> int:
    if stated is None:
        raise Fault("", "must be given")
    return fields.number("", _convert(stated, int), 0, LAST_PRIORITY)


def _subject(stated: Any) -> PolicyPeer:
    return _pods("", _convert({} if stated is None else stated, wire.PolicySubject))


def _rule(direction: str, raw: Any) -> ClusterPolicyRule:
    """Return one rule. Raises Fault with a path inside the rule."""
    w: wire.ClusterIngressRule | wire.ClusterEgressRule
    w = _convert(raw, wire.ClusterIngressRule) if direction == "ingress" else _convert(raw, wire.ClusterEgressRule)
    fields.one_of("action", w.action or "", _ACTIONS)
    side = "from" if direction == "ingress" else "to"
    if not 1 <= len(w.peers or ()) <= MOST:
        raise Fault(side, f"must hold 1 to {MOST} peers, holds {len(w.peers or ())}")
    if len(w.protocols or ()) > MOST:
        raise Fault("protocols", f"must hold at most {MOST}, holds {len(w.protocols or ())}")
    peers = [one for i, peer in enumerate(w.peers or ()) for one in _peers(f"{side}[{i}]", peer)]
    ports = [one for i, protocol in enumerate(w.protocols or ()) for one in _ports(f"protocols[{i}]", protocol)]
    for i, protocol in enumerate(w.protocols or ()):
        if protocol.destination_named_port is not None and any(peer.ip_block is not None for peer in peers):
            path = f"protocols[{i}].destinationNamedPort"
            raise Fault(path, f"must not stand beside networks, is {shown(protocol.destination_named_port)}")
    return ClusterPolicyRule(tuple(peers), tuple(ports), _ACTIONS[w.action or ""], w.name or "")


# -- peers -----------------------------------------------------------------------------------------------------------


def _peers(path: str, w: wire.PolicySubject) -> list[PolicyPeer]:
    """Return what one peer is: pods, or each of its networks."""
    if not isinstance(w, wire.EgressPeer):
        return [_pods(path, w)]
    for name, value in (("nodes", w.nodes), ("domainNames", w.domain_names)):
        if value is not None:
            raise Fault(f"{path}.{name}", f"is experimental in the API and not enforced here, is {shown(_plain(value))}")
    if w.networks is None:
        return [_pods(path, w, "networks")]
    if w.namespaces is not None or w.pods is not None:
        raise Fault(f"{path}.networks", f"must not stand beside namespaces or pods, is {shown(w.networks)}")
    if not 1 <= len(w.networks) <= MOST:
        raise Fault(f"{path}.networks", f"must hold 1 to {MOST}, holds {len(w.networks)}")
    return [PolicyPeer(ip_block=IPBlock(fields.cidr(f"{path}.networks[{i}]", text))) for i, text in enumerate(w.networks)]


def _pods(path: str, w: wire.PolicySubject, *others: str) -> PolicyPeer:
    """Return pods: all of some namespaces, or some of these."""
    inside = f"{path}.".removeprefix(".")
    if w.namespaces is not None and w.pods is not None:
        raise Fault(f"{inside}pods", f"must not stand beside namespaces, is {shown(_plain(w.pods))}")
    if w.namespaces is not None:
        return PolicyPeer(None, selector(f"{inside}namespaces", w.namespaces))
    if w.pods is None:
        raise Fault(path, f"must state {', '.join(['namespaces', 'pods', *others][:-1])} or {['pods', *others][-1]}")
    for name, value in (("namespaceSelector", w.pods.namespace_selector), ("podSelector", w.pods.pod_selector)):
        if value is None:
            raise Fault(f"{inside}pods.{name}", "must be given")
    return PolicyPeer(
        selector(f"{inside}pods.podSelector", w.pods.pod_selector),
        selector(f"{inside}pods.namespaceSelector", w.pods.namespace_selector),
    )


# -- protocols -------------------------------------------------------------------------------------------------------


def _ports(path: str, w: wire.ClusterProtocol) -> list[PolicyPort]:
    """Return the ports of one entry: those of a protocol, or wherever a name leads in whichever protocol."""
    stated = [(p, t) for p, t in zip(_PROTOCOLS, (w.tcp, w.udp, w.sctp), strict=True) if t is not None]
    if len(stated) + (w.destination_named_port is not None) != 1:
        raise Fault(path, f"must state one of tcp, udp, sctp and destinationNamedPort, is {shown(_plain(w))}")
    if w.destination_named_port is not None:
        name = fields.label_name(f"{path}.destinationNamedPort", w.destination_named_port)
        return [PolicyPort(protocol, name) for protocol in _PROTOCOLS]
    ((protocol, transport),) = stated
    if transport.destination_port is None:
        return [PolicyPort(protocol)]
    return [_port(f"{path}.{protocol.lower()}.destinationPort", protocol, transport.destination_port)]


def _port(path: str, protocol: Protocol, w: wire.DestinationPort) -> PolicyPort:
    if (w.number is None) == (w.range is None):
        raise Fault(path, f"must state a number or a range, is {shown(_plain(w))}")
    if w.range is None:
        return PolicyPort(protocol, fields.required_port(f"{path}.number", w.number))
    start = fields.required_port(f"{path}.range.start", w.range.start)
    end = fields.required_port(f"{path}.range.end", w.range.end)
    return PolicyPort(protocol, start, fields.number(f"{path}.range.end", end, start + 1, 65535))


# -- the wire --------------------------------------------------------------------------------------------------------


def _convert(raw: Any, to: type[_Value]) -> _Value:
    try:
        return msgspec.convert(raw, to)
    except (msgspec.ValidationError, RecursionError) as error:
        raise type_fault(str(error), raw) from None


def _plain(value: Any) -> Any:
    """Return a wire value as JSON has it, without what is not stated."""
    return _stated(msgspec.to_builtins(value))


def _stated(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _stated(one) for key, one in value.items() if one is not None}
    return value
