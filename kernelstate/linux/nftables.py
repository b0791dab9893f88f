"""nftables in process, in the network namespace in which the port was made, whoever calls it from where.

    apply       text  --> libnftables                 one transaction
    load        bytes --> netlink, in bulk            one transaction for each BULK elements
    fill        libnftables elsewhere --> netlink     one transaction; see nft_rules.py
    observe     netlink --> elements as values; rules, chains and sets as "equal to desired" or "something else"
    touched     events and the count of commits       which tables somebody else changed

Rules are not read as values. What an equal rule looks like is found by asking the kernel: the desired chains, without the
elements of sets, are loaded into a network namespace made for the purpose, and what the kernel then tells of them is compared,
byte by byte, with what it tells of ours. That is exact, whatever the version of kernel or library, and takes milliseconds,
for chains are few. (``nft list`` prints what it made of typeof declarations, and crashes on some.)

Source: libnftables(3), net/netfilter/nf_tables_api.c.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice

from kernelstate.diff_nftables import ABSENT
from kernelstate.errors import KernelRefusedError, MissingFeatureError
from kernelstate.features import Feature
from kernelstate.linux import nft_codec as codec
from kernelstate.linux.membarrier import wait_for_packets
from kernelstate.linux.nfnetlink import NLM_F_CREATE, NfNetlink, attribute, attributes
from kernelstate.linux.nft_events import NftEvents
from kernelstate.linux.nft_library import Library, has_library
from kernelstate.linux.nft_rules import Message, rule_messages
from kernelstate.linux.nft_shape import PROTOCOL_FAMILY, ChainForm, model, read_shape
from kernelstate.objects.nftables import Chain, Data, ElementKey, Hook, NamedSet, Rule, Table, TableKey, plain_key
from kernelstate.text import nft

BULK = 10_000
"""Elements in one transaction of a bulk load; others wait for the kernel's nftables lock as long as one takes."""

FOREIGN_RULES = (Rule((), (), "not as desired"),)
FOREIGN_HOOK = Hook("filter", "forward", 1 << 31)
"""These stand for rules and hooks that are not as desired; the priority is none that a hook can have."""

_GEN_ID = 1


def is_available() -> bool:
    """Whether nftables can be used: the library's binding is installed and the kernel knows it."""
    try:
        with NfNetlink() as netlink:
            _generation(netlink)
    except (KernelRefusedError, OSError):
        return False
    return has_library()


class NftablesPort:
    """Implements ``reconcile_table.TablePort``. To be closed at the end."""

    def __init__(self) -> None:
        self._library = Library() if has_library() else None
        self._netlink, self._writer, self._events = NfNetlink(), NfNetlink(), NftEvents()
        self._missed = False

    def close(self) -> None:
        """Close its sockets."""
        for one in (self._netlink, self._writer, self._events):
            one.close()

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when any table changed."""
        return self._events.fileno()

    def generation(self) -> int:
        """Return the kernel's count of commits in this namespace."""
        return _generation(self._netlink)

    def touched(self, keys: Collection[TableKey]) -> frozenset[TableKey] | None:
        """Return which of the tables somebody else may have changed since the last call; None if that is not known."""
        found = self._events.drain(keys)
        missed, self._missed = self._missed, False
        return None if missed else found

    # -- writing -----------------------------------------------------------------------------------------------------

    def apply(self, text: str) -> None:
        """Do the commands in one transaction. Raises KernelRefusedError with the line and the words of libnftables."""
        library = self._library
        if library is None:
            raise MissingFeatureError(Feature.NFTABLES, "libnftables' Python binding (python3-nftables) is not installed")
        self._unheard(lambda: library.run(text))

    def load(self, key: TableKey, named: NamedSet, elements: Mapping[ElementKey, Data]) -> None:
        """Add elements, none of which is there, to a set. Raises KernelRefusedError; some may have been added then."""
        start = attribute(codec.TABLE, codec.text(key.name)) + attribute(codec.ELEM_LIST_SET, codec.text(named.name))
        coder = codec.ElementCodec(key.family, named)
        rest = iter(elements.items())
        while some := dict(islice(rest, BULK)):
            if named.intervals:  # of one part these are kept by their edges, which are the library's business
                self.apply("\n".join(nft.add_elements(key, named, some)))
                continue
            messages = [(codec.NEWSETELEM, NLM_F_CREATE, start + part) for part in coder.encode(some)]
            self._commit(key, f"add elements to {named.name} in", messages)

    def fill(self, key: TableKey, sets: Mapping[str, NamedSet], chains: Mapping[str, Chain]) -> None:
        """Write the rules of chains that look up endpoints by a number again, in one transaction. Raises KernelRefusedError."""
        self._commit(key, f"fill {', '.join(chains)} in", rule_messages(key, sets, chains))

    def settle(self) -> None:
        """Return once every packet is through that was under way: 5 to 20 ms."""
        wait_for_packets()

    def _commit(self, key: TableKey, operation: str, messages: list[Message]) -> None:
        words = f"{operation} {nft.WORD[key.family]} {key.name}"
        self._unheard(lambda: self._writer.commit(words, codec.SUBSYSTEM >> 8, PROTOCOL_FAMILY[key.family], messages))

    def _unheard(self, write: Callable[[], None]) -> None:
        """Commit once without listening to it, and notice whether somebody else committed meanwhile."""
        before = self.generation()
        self._events.leave()
        done = 0
        try:
            write()
            done = 1
        finally:
            self._events.join()
            self._missed |= self.generation() != before + done

    # -- reading -----------------------------------------------------------------------------------------------------

    def observe(self, key: TableKey, like: Table) -> Table | None:
        """Return the table as the kernel holds it, None if there is none; what equals ``like`` is the same in the answer.

        Of chains and sets that are not as in ``like`` only their names are told. Raises KernelRefusedError.
        """
        if not self._exists(key):
            return None
        seen, wanted = read_shape(self._netlink, key), model(key, like)
        chains = {name: _chain(form, wanted.chains.get(name), like.chains.get(name)) for name, form in seen.chains.items()}
        sets = {
            name: like.sets[name] if wanted.sets.get(name) == form else NamedSet(name, (), "verdict" if form.is_map else "")
            for name, form in seen.sets.items()
        }
        elements = {
            name: self._elements(key, named, like.elements.get(name, {})) if named.key else {}
            for name, named in sets.items()
            if not named.dynamic
        }
        return Table(chains, sets, elements)

    def dynamic(self, key: TableKey, named: NamedSet) -> dict[ElementKey, Data]:
        """Return what packets have put into a dynamic set and what has not timed out."""
        return dict(self._dump(key, named))

    def counts(self, key: TableKey, named: NamedSet) -> dict[ElementKey, int]:
        """Return how many packets each element of a set that counts has counted; empty where there is no such set."""
        payload = attribute(codec.TABLE, codec.text(key.name)) + attribute(codec.ELEM_LIST_SET, codec.text(named.name))
        if not self._exists(key):
            return {}
        dump = self._netlink.dump(f"list elements of {named.name}", codec.GETSETELEM, PROTOCOL_FAMILY[key.family], payload)
        return dict(codec.ElementCodec(key.family, named).counted(dump))

    def _exists(self, key: TableKey) -> bool:
        name = codec.text(key.name)
        dump = self._netlink.dump("list nftables tables", codec.GETTABLE, PROTOCOL_FAMILY[key.family])
        return name in [data[slice(*attributes(data, start, end)[codec.TABLE])] for data, start, end in dump]

    def _elements(self, key: TableKey, named: NamedSet, like: Mapping[ElementKey, Data]) -> dict[ElementKey, Data]:
        """Return the elements of a set; keys that are in ``like`` are the same objects, so that memory is shared."""
        same = {plain_key(k): k for k in like} if named.intervals else {}
        held = dict(like)
        seen: set[ElementKey] = set()
        for found, data in self._dump(key, named):
            k = same.get(found, found)
            seen.add(k)
            if held.get(k, ABSENT) != data:
                held[k] = data
        if len(seen) != len(held):
            held = {k: data for k, data in held.items() if k in seen}
        return held

    def _dump(self, key: TableKey, named: NamedSet) -> Iterator[tuple[ElementKey, Data]]:
        payload = attribute(codec.TABLE, codec.text(key.name)) + attribute(codec.ELEM_LIST_SET, codec.text(named.name))
        dump = self._netlink.dump(f"list elements of {named.name}", codec.GETSETELEM, PROTOCOL_FAMILY[key.family], payload)
        return codec.ElementCodec(key.family, named).decode(dump)


def _chain(seen: ChainForm, wanted: ChainForm | None, like: Chain | None) -> Chain:
    """Return the desired chain if the kernel holds just that."""
    if wanted is None or like is None:
        return Chain(FOREIGN_RULES, None if like is None else FOREIGN_HOOK)
    if seen == wanted:
        return like
    return Chain(FOREIGN_RULES, like.hook if seen.base == wanted.base else FOREIGN_HOOK)


def _generation(netlink: NfNetlink) -> int:
    data, start, end = netlink.get("read the nftables generation", codec.GETGEN, 0)
    return int.from_bytes(data[slice(*attributes(data, start, end)[_GEN_ID])], "big")
