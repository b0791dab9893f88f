"""Rules that libnftables 1.0.6 cannot add to a table that is there already: those that look up an endpoint by a number.

    chains --libnftables--> a new table in a namespace made for the purpose --netlink--> rules as bytes --netlink--> our table

``dnat to ip daddr . meta l4proto . th dport . numgen random mod 3 map @endpoints`` is right where the map is declared in the same
text. For a map that the kernel holds already the library takes the map's typeof for an expression of the rule and refuses it
("conflicting protocols specified: ip vs. th"); declared as ``tcp dport`` it is taken, and the rule then silently wants TCP. So
the library translates them where the map is new, and what it made is sent to where it is not.

Source: stmt_evaluate_nat_map in nftables' src/evaluate.c; net/netfilter/nf_tables_api.c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kernelstate.diff_nftables import diff_tables
from kernelstate.linux import netns
from kernelstate.linux import nft_codec as codec
from kernelstate.linux.nfnetlink import NLM_F_APPEND, NLM_F_CREATE, NfNetlink, attribute, attributes
from kernelstate.linux.nft_library import Library
from kernelstate.linux.nft_shape import PROTOCOL_FAMILY
from kernelstate.objects.nftables import (
    AddressIs,
    Chain,
    GotoChain,
    JumpChain,
    NamedSet,
    ProtocolIs,
    Rule,
    Table,
    TableKey,
)

Message = tuple[int, int, bytes]


def rule_messages(key: TableKey, sets: Mapping[str, NamedSet], chains: Mapping[str, Chain]) -> list[Message]:
    """Return the messages (type, flags, payload) that empty these chains and fill them again; ``sets`` are those they ask.

    Raises KernelRefusedError and MissingFeatureError. Rules with anonymous sets are not for this way.
    """
    assert not any(_has_anonymous_set(rule) for chain in chains.values() for rule in chain.rules)
    # Chains they lead to have to be there to be named, and are empty.
    found = {**{name: Chain(()) for name in _led_to(chains)}, **chains}
    text = diff_tables(key, None, Table(found, dict(sets), {}), None).text()

    def translate() -> list[Message]:
        Library().run(text)
        with NfNetlink() as netlink:
            return list(_filled(netlink, key))

    table = attribute(codec.TABLE, codec.text(key.name))
    emptied = [(codec.DELRULE, 0, table + attribute(codec.RULE_CHAIN, codec.text(name))) for name in chains]
    return emptied + netns.call_apart(translate)


def _filled(netlink: NfNetlink, key: TableKey) -> Iterator[Message]:
    """Yield a message for each rule of a table, that appends the same rule to the same chain."""
    for data, start, end in netlink.dump("list nftables rules", codec.GETRULE, PROTOCOL_FAMILY[key.family]):
        found = attributes(data, start, end)
        parts = (codec.TABLE, codec.RULE_CHAIN, codec.RULE_EXPRESSIONS, codec.RULE_USERDATA)
        payload = b"".join(attribute(part, data[slice(*found[part])]) for part in parts if part in found)
        yield codec.NEWRULE, NLM_F_CREATE | NLM_F_APPEND, payload


def _led_to(chains: Mapping[str, Chain]) -> set[str]:
    statements = [s for chain in chains.values() for rule in chain.rules for s in rule.statements]
    return {s.chain for s in statements if isinstance(s, JumpChain | GotoChain)}


def _has_anonymous_set(rule: Rule) -> bool:
    values = [
        m.prefixes if isinstance(m, AddressIs) else m.protocols for m in rule.matches if isinstance(m, AddressIs | ProtocolIs)
    ]
    return any(len(several) > 1 for several in values)
