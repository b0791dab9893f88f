"""The overlay's rules in nftables: for every packet the same answer as the same rules in iptables."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from overlay_worlds import DUAL, N1, N2, UPLINK, compile_nodes, snapshot

from kernelstate.objects.address import Prefix
from kernelstate.objects.nftables import TableKey
from kernelstate.simulate import Packet, Simulator
from kernelstate.simulate_nftables import NftablesSimulator
from kernelstate.text.nft import print_table
from overlay.render.masquerade import render_masquerade
from overlay.render.masquerade_nftables import NAMES, render_masquerade_tables

TABLE = compile_nodes(snapshot(N1, N2), "n1", DUAL, UPLINK)
EXEMPT = (Prefix.parse("172.16.0.0/12"), Prefix.parse("fd00:172::/32"))
ADDRESSES = {
    4: ["10.244.1.7", "10.244.2.7", "10.244.9.9", "192.168.1.1", "172.16.5.5", "8.8.8.8", "224.0.0.251"],
    6: ["fd00:244:0:1::7", "fd00:244:0:2::7", "fd00:244:0:9::9", "fd00:1::1", "fd00:172::5", "2001:db8::8", "ff02::fb"],
}


@st.composite
def packets(draw) -> Packet:
    family = draw(st.sampled_from([4, 6]))
    source, destination = (ip_address(draw(st.sampled_from(ADDRESSES[family]))) for _ in range(2))
    return Packet("tcp", source, destination, 80, mark=draw(st.sampled_from([0, 0x4000, 0xC000, 0x8000])))


@given(packets(), st.booleans(), st.booleans())
def test_same_as_in_iptables(packet, masq, forward):
    """Whose source is hidden, and who is forwarded, is the same through nftables and through iptables."""
    options = {"ip_masq": masq, "forward_rules": forward, "never_masquerade": EXEMPT}
    one = Simulator(render_masquerade(TABLE, **options))
    other = NftablesSimulator(render_masquerade_tables(TABLE, **options))
    assert {(p.verdict, p.masquerade) for p in one.walk(packet)} == {(p.verdict, p.masquerade) for p in other.walk(packet)}


@pytest.mark.parametrize(("masq", "forward"), [(False, False), (True, False), (False, True)])
def test_only_what_is_wanted(masq, forward):
    """A chain is there only for rules that are wanted, and a table only for chains."""
    tables = render_masquerade_tables(TABLE, ip_masq=masq, forward_rules=forward)
    wanted = {name for name, on in (("postrtg", masq), ("forward", forward)) if on}
    assert {name for table in tables.values() for name in table.chains} == wanted
    assert set(tables) == ({4, 6} if wanted else set())


def test_prints_flannels_layout():
    """Names, hooks and order are flannel's."""
    tables = render_masquerade_tables(TABLE, ip_masq=True, never_masquerade=EXEMPT)
    assert print_table(TableKey(4, NAMES[4]), tables[4]) == WANTED


WANTED = """\
table ip flannel-ipv4 {
	chain forward {
		type filter hook forward priority 0; policy accept;
		ip saddr 10.244.0.0/16 accept
		ip daddr 10.244.0.0/16 accept
	}

	chain postrtg {
		type nat hook postrouting priority 100; policy accept;
		meta mark & 0x00004000 != 0x00000000 return
		ip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return
		ip saddr 10.244.0.0/16 ip daddr 10.244.1.0/24 return
		ip saddr != 10.244.0.0/16 ip daddr 10.244.1.0/24 return
		ip saddr 10.244.0.0/16 ip daddr 172.16.0.0/12 return
		ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random
	}
}
"""
