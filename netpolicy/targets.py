"""Which pods here each policy is about, kept as pods, namespaces and policies change.

    NetworkPolicy shop/db             pods of its own namespace that its podSelector selects
    ClusterNetworkPolicy no-telnet    pods of whichever namespaces its subject selects; its name here is ("", "no-telnet")

A pod that changes is held against the policies of its namespace and those of the whole cluster; a policy that changes, against
the pods that have a label it asks for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import TypeAlias

from clusterstate.objects import ClusterNetworkPolicy, LabelSelector, Namespace, NetworkPolicy, Pod
from clusterstate.snapshot import Name, Snapshot
from netpolicy.selector import namespace_labels, selects

Stated: TypeAlias = NetworkPolicy | ClusterNetworkPolicy
EVERYWHERE = ""
"""Stands for the namespace of policies of the whole cluster."""


def stated_policy(snapshot: Snapshot, name: Name) -> Stated | None:
    """Return a policy as its object states it."""
    if name[0] == EVERYWHERE:
        return snapshot.cluster_policies.get(name[1])
    return snapshot.policies.get(name)


class Targets:
    """The pods here that each policy is about."""

    def __init__(self) -> None:
        self._pods: dict[Name, set[Name]] = {}
        """By policy, every one there is."""
        self._policies: dict[str, set[Name]] = defaultdict(set)
        """By namespace."""

    def of(self, policy: Name) -> set[Name]:
        """Return the pods that a policy is about."""
        return self._pods.get(policy, set())

    def policies(self, pod: Name) -> list[Name]:
        """Return the policies that are about a pod, sorted by namespace and name: those of the whole cluster first."""
        return sorted(policy for policy in self._candidates(pod[0]) if pod in self._pods[policy])

    def used(self) -> Iterable[Name]:
        """Return the policies that are about any pod."""
        return (name for name, found in self._pods.items() if found)

    def move(
        self,
        snapshot: Snapshot,
        pods: AbstractSet[Name],
        policies: AbstractSet[Name],
        here: Callable[[Name], Pod | None],
        find: Callable[[str, LabelSelector | None], Collection[Name]],
    ) -> tuple[set[Name], set[Name]]:
        """Find anew what changed: these pods and policies. Return the pods concerned, and the policies that are or were about them.

        ``find`` returns the pods of a namespace (empty: of any) that a selector may select, and perhaps a few more.
        """
        touched: set[Name] = set()
        about: set[Name] = set()
        for policy in policies:
            touched |= self.of(policy)
            if stated_policy(snapshot, policy) is None:
                self._policies[policy[0]].discard(policy)
                self._pods.pop(policy, None)
            else:
                self._policies[policy[0]].add(policy)
                self._pods.setdefault(policy, set())
        others = {namespace: self._candidates(namespace) - policies for namespace in {name[0] for name in pods}}
        for name in pods:
            pod = here(name)
            found = {policy for policy in others[name[0]] if self._settle(snapshot, policy, name, pod)}
            touched |= {name} if found else set()
            about |= found
        for policy in policies:
            if policy in self._pods:
                among = {*self._pods[policy], *find(policy[0], _pod_selector(stated_policy(snapshot, policy)))}
                touched |= {name for name in among if self._settle(snapshot, policy, name, here(name))}
        return touched, about | set(policies)

    def _candidates(self, namespace: str) -> set[Name]:
        return self._policies[namespace] | self._policies[EVERYWHERE]

    def _settle(self, snapshot: Snapshot, policy: Name, name: Name, pod: Pod | None) -> bool:
        """Settle whether a policy is about a pod; return whether it is or was."""
        stated, pods = stated_policy(snapshot, policy), self._pods[policy]
        did = name in pods
        does = pod is not None and stated is not None and _is_about(stated, pod, snapshot.namespaces)
        if does:
            pods.add(name)
        else:
            pods.discard(name)
        return does or did


def _pod_selector(policy: Stated | None) -> LabelSelector | None:
    if isinstance(policy, ClusterNetworkPolicy):
        return policy.subject.pod_selector
    return policy.pod_selector if policy is not None else None


def _is_about(policy: Stated, pod: Pod, namespaces: Mapping[str, Namespace]) -> bool:
    if isinstance(policy, NetworkPolicy):
        return policy.namespace == pod.namespace and selects(policy.pod_selector, pod.labels)
    subject = policy.subject
    if subject.namespace_selector is not None and not selects(
        subject.namespace_selector, namespace_labels(namespaces, pod.namespace)
    ):
        return False
    return subject.pod_selector is None or selects(subject.pod_selector, pod.labels)
