"""ipvsadm's own words, and those of the matches around it in iptables."""

from ipaddress import ip_address

import pytest

from kernelstate.errors import ParseError
from kernelstate.objects.ipvs import RealServer, ServerKey, VirtualServer
from kernelstate.objects.netfilter import AddrType, FromBridgePort, OtherMatch, SetMatch
from kernelstate.text.iptables_options import read_match
from kernelstate.text.iptables_save import parse_save, print_ruleset
from kernelstate.text.ipvsadm import parse_servers, print_servers

VIP, POD = int(ip_address("10.96.0.10")), int(ip_address("10.244.1.7"))
VIP6, POD6 = int(ip_address("fd00::10")), int(ip_address("fd00:244::7"))

PRINTED = """\
-A --sctp-service 10.96.0.10:9 -s rr
-A -t 10.96.0.10:80 -s sh -b sh-port
-a -t 10.96.0.10:80 -r 10.244.1.7:8080 -m -w 1
-a -t 10.96.0.10:80 -r 10.244.1.7:8081 -m -w 0
-A -u [fd00::10]:53 -s mh -p 10800
-a -u [fd00::10]:53 -r [fd00:244::7]:53 -m -w 1
"""
SERVERS = {
    ServerKey(6, "udp", VIP6, 53): VirtualServer("mh", (RealServer(POD6, 53),), 10800),
    ServerKey(4, "tcp", VIP, 80): VirtualServer("sh", (RealServer(POD, 8080), RealServer(POD, 8081, 0)), by_port=True),
    ServerKey(4, "sctp", VIP, 9): VirtualServer("rr", ()),
}


def test_words() -> None:
    """Every protocol, family and option in the words of ipvsadm -R, sorted; and back."""
    assert print_servers(SERVERS) == PRINTED
    assert parse_servers(PRINTED) == SERVERS


@pytest.mark.parametrize(
    "text",
    [
        "-A -f 1 -s rr",
        "-A -t 10.0.0.1:80 -s rr -o",
        "-A -t 10.0.0.1:80 -s rr -M 255.255.0.0",
        "-A -t 10.0.0.1:80 -s rr\n-a -t 10.0.0.1:80 -r 10.0.0.2:80 -g -w 1",
        "-A -t 10.0.0.1:80 -s rr\n-a -t 10.0.0.1:80 -r [fd00::1]:80 -m -w 1",
        "-a -t 10.0.0.1:80 -r 10.0.0.2:80 -m -w 1",
        "-C",
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    """What is never ours (marks, direct routing, masks) is an error that shows the line, not a server of ours."""
    with pytest.raises(ParseError, match="cannot parse"):
        parse_servers(text + "\n")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("set --match-set KUBE-A dst,dst", SetMatch("KUBE-A", ("dst", "dst"))),
        ("set ! --match-set KUBE-A src", SetMatch("KUBE-A", ("src",), negated=True)),
        ("physdev ! --physdev-is-in", FromBridgePort(negated=True)),
        ("physdev --physdev-is-in", FromBridgePort()),
        ("addrtype ! --src-type LOCAL --dst-type LOCAL", AddrType("LOCAL", "LOCAL", src_negated=True)),
        ("addrtype --src-type LOCAL ! --dst-type LOCAL", AddrType("LOCAL", "LOCAL", dst_negated=True)),
    ],
)
def test_matches_are_typed_and_printed_back(words: str, match: object) -> None:
    """Each row: words behind -m that are one of ours, whose text is the same again."""
    name, *options = words.split()
    assert read_match(name, tuple(options), 4) == match
    text = f"*filter\n-A INPUT -m {words} -j DROP\nCOMMIT\n"
    assert print_ruleset(parse_save(text, 4), 4) == text


@pytest.mark.parametrize(
    "words",
    [
        "set --match-set KUBE-A dst --packets-gt 5",
        "set --match-set KUBE-A dst ! --update-counters",
        "set --match-set KUBE-A both",
        "physdev --physdev-in eth0",
        "physdev --physdev-is-bridged",
        "addrtype --dst-type LOCAL --limit-iface-in",
    ],
)
def test_one_option_more_is_carried_in_words(words: str) -> None:
    """Each row: a match that says more than ours can, kept as it is."""
    name, *options = words.split()
    assert read_match(name, tuple(options), 4) == OtherMatch((name, *options))
