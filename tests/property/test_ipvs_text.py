"""Whatever servers and sets there are, their text reads back as the same servers and sets."""

from hypothesis import given
from hypothesis import strategies as st

from kernelstate.objects.address import BITS
from kernelstate.objects.ipvs import RealServer, ServerKey, VirtualServer
from kernelstate.objects.sets import IpSet, SetSpec
from kernelstate.text.ipset_save import parse_sets, print_sets
from kernelstate.text.ipvsadm import parse_servers, print_servers

PORTS = st.integers(1, 65535)
PROTOCOLS = st.sampled_from(["tcp", "udp", "sctp"])


def numbers(family):
    """Return a strategy of addresses."""
    return st.integers(0, (1 << BITS[family]) - 1)


@st.composite
def servers(draw):
    """Draw virtual servers of both families."""
    state = {}
    for family in draw(st.lists(st.sampled_from([4, 6]), max_size=4)):
        key = ServerKey(family, draw(PROTOCOLS), draw(numbers(family)), draw(PORTS))
        reals = draw(st.lists(st.tuples(numbers(family), PORTS), max_size=3, unique=True))
        scheduler = draw(st.sampled_from(["rr", "wlc", "sh", "mh"]))
        state[key] = VirtualServer(
            scheduler,
            tuple(sorted(RealServer(a, p, draw(st.integers(0, 100))) for a, p in reals)),
            draw(st.sampled_from([0, 1, 10800])),
            scheduler in {"sh", "mh"} and draw(st.booleans()),
        )
    return state


@st.composite
def sets(draw):
    """Draw sets of every type."""
    found = {}
    types = ["hash:ip", "hash:net", "hash:ip,port", "hash:ip,port,ip", "hash:ip,port,net", "bitmap:port"]
    for i, kind in enumerate(draw(st.lists(st.sampled_from(types), max_size=4))):
        family = 4 if kind == "bitmap:port" else draw(st.sampled_from([4, 6]))
        members = frozenset(draw(st.lists(members_of(kind, family), max_size=4)))
        found[f"KUBE-{i}"] = IpSet(SetSpec(f"KUBE-{i}", kind, family), members)
    return found


@st.composite
def members_of(draw, kind, family):
    """Draw a member of a set's type."""
    if kind == "bitmap:port":
        return (draw(PORTS),)
    member = []
    for dimension in kind.partition(":")[2].split(","):
        if dimension == "port":
            member += [draw(PROTOCOLS), draw(PORTS)]
        elif dimension == "net":
            length = draw(st.integers(1, BITS[family]))
            shift = BITS[family] - length
            member.append((draw(numbers(family)) >> shift << shift, length))
        else:
            member.append(draw(numbers(family)))
    return tuple(member)


@given(servers())
def test_parse_of_print_is_the_servers(state):
    """parse(print(x)) = x, whatever order the servers are held in."""
    text = print_servers(state)
    assert parse_servers(text) == state
    assert print_servers(dict(reversed(state.items()))) == text


@given(sets())
def test_parse_of_print_is_the_sets(state):
    """parse(print(x)) = x, whatever order the sets are held in."""
    text = print_sets(state)
    assert parse_sets(text) == state
    assert print_sets(dict(reversed(state.items()))) == text
