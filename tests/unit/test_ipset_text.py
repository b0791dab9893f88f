"""ipset's own words: how sets and members are printed, and what of ``ipset save`` is read over or refused."""

from ipaddress import ip_address

import pytest

from kernelstate.errors import ParseError
from kernelstate.objects.sets import IpSet, SetSpec
from kernelstate.text.ipset_save import parse_sets, print_create, print_sets

A, B = int(ip_address("10.0.0.1")), int(ip_address("fd00::1"))
NET = (int(ip_address("10.1.0.0")), 16)

PRINTED = """\
create KUBE-6-CLUSTER-IP hash:ip,port family inet6 hashsize 1024 maxelem 65536
add KUBE-6-CLUSTER-IP fd00::1,udp:53
create KUBE-LOOP-BACK hash:ip,port,ip family inet hashsize 1024 maxelem 65536
add KUBE-LOOP-BACK 10.0.0.1,sctp:9,10.0.0.1
create KUBE-NODE-PORT-TCP bitmap:port range 0-65535
add KUBE-NODE-PORT-TCP 30080
add KUBE-NODE-PORT-TCP 30090
create KUBE-SOURCE hash:ip,port,net family inet hashsize 1024 maxelem 65536
add KUBE-SOURCE 10.0.0.1,tcp:80,10.0.0.1
add KUBE-SOURCE 10.0.0.1,tcp:80,10.1.0.0/16
"""
SETS = {
    "KUBE-SOURCE": IpSet(SetSpec("KUBE-SOURCE", "hash:ip,port,net"), frozenset({(A, "tcp", 80, NET), (A, "tcp", 80, (A, 32))})),
    "KUBE-NODE-PORT-TCP": IpSet(SetSpec("KUBE-NODE-PORT-TCP", "bitmap:port"), frozenset({(30090,), (30080,)})),
    "KUBE-LOOP-BACK": IpSet(SetSpec("KUBE-LOOP-BACK", "hash:ip,port,ip"), frozenset({(A, "sctp", 9, A)})),
    "KUBE-6-CLUSTER-IP": IpSet(SetSpec("KUBE-6-CLUSTER-IP", "hash:ip,port", 6), frozenset({(B, "udp", 53)})),
}


def test_words() -> None:
    """Every type in the words of ipset restore, sorted; and back."""
    assert print_sets(SETS) == PRINTED
    assert parse_sets(PRINTED) == SETS


def test_what_save_says_besides_is_read_over() -> None:
    """The options of a create line that say nothing about meaning do not matter."""
    saved = "create S hash:ip family inet6 hashsize 1024 maxelem 262144 bucketsize 12 initval 0x1a2b3c4d\nadd S fd00::1\n"
    assert parse_sets(saved) == {"S": IpSet(SetSpec("S", "hash:ip", 6), frozenset({(B,)}))}


def test_ceiling_is_sized_to_need() -> None:
    """A set of more members than ipset's default allows is made larger."""
    assert print_create(SetSpec("S", "hash:ip"), 10) == "create S hash:ip family inet hashsize 1024 maxelem 65536"
    counting = "create S hash:ip family inet hashsize 1024 maxelem 65536 counters"
    assert print_create(SetSpec("S", "hash:ip", counters=True), 10) == counting
    assert parse_sets(counting) == {"S": IpSet(SetSpec("S", "hash:ip", counters=True))}
    assert print_create(SetSpec("S", "hash:ip"), 100_000) == "create S hash:ip family inet hashsize 1024 maxelem 262144"


@pytest.mark.parametrize(
    "line", ["create S list:set size 8", "add T 10.0.0.1", "destroy S", "create", "create S hash:ip family inet\nadd S x"]
)
def test_other_lines_are_refused(line: str) -> None:
    """A set of another type, a member of no set and any other command are errors that show the line."""
    with pytest.raises(ParseError, match="cannot parse"):
        parse_sets(line + "\n")
