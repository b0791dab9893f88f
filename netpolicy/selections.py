"""Which pods each peer selects: one selection for all rules that say the same, kept as pods and namespaces change.

    "pods labelled app: web in namespaces labelled team: a"  -->  {10.244.1.7, 10.244.2.9}     used by three policies

A selection that requires a label is looked up by it, and so are pods: a pod that changes is held against the selections that ask for
one of its labels, or for none, and a new selection against the pods that have its label. What a rule holds is the selection's own
set of addresses, which costs nothing to share and little to change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import TypeAlias, TypeVar

import msgspec

from clusterstate.objects import IPAddress, LabelSelector, Namespace, Pod
from clusterstate.snapshot import Name
from netpolicy.selector import namespace_labels, selects
from netpolicy.table import NO_ADDRESSES, Addresses


class Selection(msgspec.Struct, frozen=True):
    """Pods in one ``namespace``, or in those that ``namespaces`` selects; ``pods`` None: all of them."""

    namespace: str
    namespaces: LabelSelector | None
    pods: LabelSelector | None


class PeerChange(msgspec.Struct, frozen=True):
    """Which addresses came to a set of peers, and which left it."""

    come: frozenset[IPAddress]
    gone: frozenset[IPAddress]


Pair: TypeAlias = tuple[str, str]
"""A label's key and value."""
_Key = TypeVar("_Key")


class _Held:
    """What one selection holds."""

    def __init__(self) -> None:
        self.members: dict[Name, tuple[IPAddress, ...]] = {}
        self.addresses: Addresses = NO_ADDRESSES
        self.before: dict[IPAddress, bool] = {}
        """Of addresses that moved since the changes were taken: whether they were held then."""

    def put(self, name: Name, ips: tuple[IPAddress, ...]) -> bool:
        """Let a pod be a member with these addresses, none: no member; return whether that changes anything."""
        before = self.members.get(name, ())
        if before == ips:
            return False
        for ip in {*before, *ips}:
            self.before.setdefault(ip, ip in self.addresses)
        for ip in before:
            count = self.addresses[ip] - 1
            self.addresses = self.addresses.set(ip, count) if count else self.addresses.delete(ip)
        for ip in ips:
            self.addresses = self.addresses.set(ip, self.addresses.get(ip, 0) + 1)
        if ips:
            self.members[name] = ips
        else:
            self.members.pop(name, None)
        return True


class Selections:
    """Every selection in use, and every pod that can be selected."""

    def __init__(self) -> None:
        self.names: dict[Name, Pod] = {}
        """The pods there are."""
        self.moved = False
        """Whether any pod changed since ``dirty_users`` was asked."""
        self._namespaces: Mapping[str, Namespace] = {}
        self._by_namespace: dict[str, set[Name]] = defaultdict(set)
        self._by_label: dict[Pair, set[Name]] = defaultdict(set)
        """The pods there are, by what can be asked of them."""
        self._held: dict[Selection, _Held] = {}
        self._filed: dict[Pair | None, dict[Selection, _Held]] = defaultdict(dict)
        """The same by a label that they require, under each of its values; None: those that require none."""
        self._users: dict[Selection, set[Name]] = defaultdict(set)
        self._used: dict[Name, set[Selection]] = {}
        self._dirty: set[Selection] = set()

    def move(self, name: Name, pod: Pod | None, namespaces: Mapping[str, Namespace]) -> None:
        """Take in a pod as it is now, None: it is gone; its namespace's labels may have changed as well."""
        self.moved = True
        self._namespaces = namespaces
        before = self.names.get(name)
        self._index(name, before, pod)
        for pair in {None, *_labels(before), *_labels(pod)}:
            for selection, held in self._filed.get(pair, {}).items():
                if held.put(name, self._ips(selection, pod)):
                    self._dirty.add(selection)

    def use(self, user: Name, wanted: set[Selection]) -> None:
        """Say which selections a policy uses from now on."""
        for selection in self._used.get(user, set()) - wanted:
            self._drop(user, selection)
        for selection in wanted:
            self._users[selection].add(user)
            if selection not in self._held:
                held = self._held[selection] = _Held()
                for pair in _required(selection.pods) or (None,):
                    self._filed[pair][selection] = held
                for name in self.candidates(selection.namespace, selection.pods):
                    held.put(name, self._ips(selection, self.names[name]))
                held.before.clear()
        self._used[user] = wanted

    def candidates(self, namespace: str, selector: LabelSelector | None) -> Collection[Name]:
        """Return the pods of a namespace (empty: of any) that a selector may select, and perhaps a few more of it."""
        whole: Collection[Name] = self._by_namespace.get(namespace, frozenset()) if namespace else self.names
        pairs = _required(selector)
        if pairs is None:
            return whole
        sets: list[AbstractSet[Name]] = [self._by_label.get(pair, frozenset()) for pair in pairs]
        if sum(map(len, sets)) >= len(whole):
            return whole
        return {name for one in sets for name in one if namespace in {"", name[0]}}

    def forget(self, user: Name) -> None:
        """Say that a policy uses none any more."""
        for selection in self._used.pop(user, set()):
            self._drop(user, selection)

    def addresses(self, selections: Collection[Selection]) -> Addresses:
        """Return the addresses of all pods that any of them selects."""
        sets = [self._held[one].addresses for one in dict.fromkeys(selections)]
        if len(sets) <= 1:
            return sets[0] if sets else NO_ADDRESSES
        largest = max(sets, key=len)
        with largest.mutate() as union:
            for one in sets:
                if one is not largest:
                    for ip, count in one.items():
                        union[ip] = union.get(ip, 0) + count
        return union.finish()

    def members(self, selections: Iterable[Selection]) -> set[Name]:
        """Return the names of all pods that any of them selects."""
        return {name for one in selections for name in self._held[one].members}

    def take_changes(self) -> dict[Selection, PeerChange]:
        """Return the selections whose addresses changed since the last call, and how."""
        found = {}
        for selection in self._dirty:
            held = self._held.get(selection)
            if held is None:
                continue
            come = frozenset(ip for ip, was in held.before.items() if not was and ip in held.addresses)
            gone = frozenset(ip for ip, was in held.before.items() if was and ip not in held.addresses)
            held.before.clear()
            found[selection] = PeerChange(come, gone)  # of neither if only the number of pods with one address changed
        self._dirty, self.moved = set(), False
        return found

    def users(self, selections: Iterable[Selection]) -> set[Name]:
        """Return the policies that use any of these."""
        return {user for selection in selections for user in self._users[selection]}

    def _drop(self, user: Name, selection: Selection) -> None:
        self._users[selection].discard(user)
        if not self._users[selection]:
            del self._users[selection], self._held[selection]
            for pair in _required(selection.pods) or (None,):
                del self._filed[pair][selection]
                if not self._filed[pair]:
                    del self._filed[pair]

    def _index(self, name: Name, before: Pod | None, pod: Pod | None) -> None:
        """Let a pod be found by what it is now."""
        if pod is None:
            self.names.pop(name, None)
            _take(self._by_namespace, name[0], name)
        else:
            self.names[name] = pod
            self._by_namespace[name[0]].add(name)
        old, new = set(_labels(before)), set(_labels(pod))
        for pair in old - new:
            _take(self._by_label, pair, name)
        for pair in new - old:
            self._by_label[pair].add(name)

    def _ips(self, selection: Selection, pod: Pod | None) -> tuple[IPAddress, ...]:
        """Return a pod's addresses if it is selected, else none."""
        if pod is None:
            return ()
        if selection.namespace and pod.namespace != selection.namespace:
            return ()
        if selection.namespaces is not None and not selects(
            selection.namespaces, namespace_labels(self._namespaces, pod.namespace)
        ):
            return ()
        return pod.ips if selection.pods is None or selects(selection.pods, pod.labels) else ()


def _required(selector: LabelSelector | None) -> tuple[Pair, ...] | None:
    """Return labels of which a selected pod has one, as few as can be; None: it need not have any of a known value."""
    stated = [one for one in (selector.requirements if selector is not None else ()) if one.operator == "In"]
    if not stated:
        return None
    narrowest = min(stated, key=lambda one: len(one.values))
    return tuple((narrowest.key, value) for value in dict.fromkeys(narrowest.values))


def _labels(pod: Pod | None) -> Iterator[Pair]:
    return iter(()) if pod is None else iter(pod.labels.items())


def _take(index: dict[_Key, set[Name]], key: _Key, name: Name) -> None:
    """Take a pod out of an index."""
    held = index.get(key)
    if held is not None:
        held.discard(name)
        if not held:
            del index[key]
