"""The short way by which a plain ClusterIP is rendered writes what the general way writes."""

import msgspec
import pytest
from entries import entry_of
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from service_worlds import NODE, POD_CIDRS, address

from proxy.render.iptables import EntryContext, EntryWriter, is_plain, render_entry, render_plain
from proxy.settings import LocalDetector, NodePortScope
from proxy.table import Backend, Frontend, Kind, PortName, ServiceEntry


@st.composite
def plain_entries(draw, family):
    """Draw a Service of one ClusterIP with endpoints: any number up to 300, which is past the prepared probabilities."""
    name = PortName(
        "ns", draw(st.sampled_from(["web", "dns"])), draw(st.sampled_from(["", "http"])), draw(st.sampled_from(["TCP", "UDP"]))
    )
    count = draw(st.one_of(st.integers(1, 4), st.integers(250, 300)))
    base = int(address(family, 1, 1))
    kind = type(address(family, 1, 1))
    pool = tuple(
        Backend(f"{kind(base + i)}:80", kind(base + i), 80, draw(st.booleans()) if i < 4 else False) for i in range(count)
    )
    return ServiceEntry(name, family, (Frontend(Kind.CLUSTER_IP, address(family, 2, 1), 80),), cluster=pool, has_any=True)


@st.composite
def contexts(draw, family):
    """Draw what rules depend on besides the entry."""
    detectors = [
        None,
        LocalDetector(prefix=POD_CIDRS[family]),
        LocalDetector(interface="cni0"),
        LocalDetector(interface="veth+"),
    ]
    return EntryContext(
        family,
        draw(st.booleans()),
        draw(st.sampled_from(detectors)),
        NodePortScope(everywhere=True),
        tuple(a for a in NODE.addresses if a.version == family),
        draw(st.booleans()),
        draw(st.booleans()),
    )


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.sampled_from([4, 6]).flatmap(lambda family: st.tuples(plain_entries(family), contexts(family))))
def test_plain_equals_general(drawn):
    """For a plain entry the short way gives the same rules in the same order of chains as the general one."""
    entry, context = drawn
    assert is_plain(entry)
    short, general = render_plain(entry, context), EntryWriter(entry, context).write()
    assert list(short.chains.items()) == list(general.chains.items())
    assert short.shared == general.shared
    assert render_entry(entry, context) == general


PLAIN = entry_of("web")


@pytest.mark.parametrize(
    "entry",
    [
        entry_of("web", node_port=30080),
        msgspec.structs.replace(PLAIN, frontends=()),
        msgspec.structs.replace(PLAIN, frontends=(Frontend(Kind.NODE_PORT, None, 30080),)),
        msgspec.structs.replace(PLAIN, cluster=()),
        msgspec.structs.replace(PLAIN, local=PLAIN.cluster),
        msgspec.structs.replace(PLAIN, internal_local=True),
        msgspec.structs.replace(PLAIN, affinity_seconds=10800),
        msgspec.structs.replace(PLAIN, health_check_node_port=32000),
    ],
    ids=["two frontends", "none", "node port", "no pool", "local pool", "policy Local", "affinity", "health check"],
)
def test_anything_more_is_not_plain(entry):
    """Whatever the short way does not write keeps an entry from going it."""
    assert is_plain(PLAIN)
    assert not is_plain(entry)
