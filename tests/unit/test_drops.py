"""What ``nodeplane drops`` prints, and what it reads beside the kernel: names of reasons, headers."""

import re

import pytest

from kernelstate.errors import MissingFeatureError
from kernelstate.linux import tracing
from kernelstate.linux.droptrace import SLOTS, Drop, Latency
from nodeplane import drops
from nodeplane.__main__ import main

FORMAT = 'print fmt: "%p reason: %s", REC->skbaddr, __print_symbolic(REC->reason, { 2, "NOT_SPECIFIED" }, { 0x3, "NO_SOCKET" })'
DENIED = Drop("NETFILTER_DROP", "nft_do_chain", 7, "veth1", "TCP", "10.244.1.2", 4242, "10.244.2.3", 80, 1200)


def test_names_of_reasons():
    """The kernel's own list of names is read, numbers in either notation."""
    assert tracing.symbols(FORMAT, "reason") == {2: "NOT_SPECIFIED", 3: "NO_SOCKET"}
    assert tracing.symbols(FORMAT, "other") == {}


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [
        (["6.1.0-9-amd64", "6.1.0-56-amd64"], "6.1.0-56-amd64"),
        (["6.1.0-56-amd64", "5.10.0-99-amd64"], "6.1.0-56-amd64"),
        (["6.18.44", "6.99.0"], "6.18.44"),
    ],
)
def test_headers_that_are_used(tmp_path, installed, chosen):
    """Those of the running kernel, else the newest; a directory without headers is none."""
    (tmp_path / "9.9.9/build").mkdir(parents=True)
    for version in installed:
        (tmp_path / version / "build").mkdir(parents=True)
        (tmp_path / version / "source/include/linux").mkdir(parents=True)
        (tmp_path / version / "source/include/linux/kconfig.h").touch()
    assert tracing.headers("6.18.44", tmp_path) == tmp_path / chosen / "build"


def test_without_headers(tmp_path):
    """Where there are none the error says what to install."""
    with pytest.raises(MissingFeatureError, match="apt-get install linux-headers"):
        tracing.headers("6.18.44", tmp_path)


def test_a_line():
    """A drop's line has number, reason, namespace, link, both ends with their names, and the kernel's function."""
    line = drops.line_of(drops.Shown(0.0, "node-1", DENIED, "shop/web", "service shop/db"))
    words = re.split(r" {2,}", line)
    assert words[1:] == [
        "1,200",
        ["NETFILTER_DROP", "", "", " node-1"][0],
        "node-1",
        "veth1",
        "TCP 10.244.1.2:4242 (shop/web) -> 10.244.2.3:80 (service shop/db) nft_do_chain",
    ]


def test_a_histogram():
    """A line for each power of two from the smallest to the largest that occurs, longest bar for the most."""
    slots = [0] * SLOTS
    slots[10], slots[12] = 1, 4
    assert drops.histogram(Latency("x", tuple(slots)), width=8) == [
        "x: 5 times",
        "   1.02 us to 2.05 us          1  ##",
        "   2.05 us to 4.1 us           0",
        "    4.1 us to 8.19 us          4  ########",
    ]
    assert drops.histogram(Latency("x", (0,) * SLOTS)) == ["x: never happened"]


@pytest.mark.parametrize(
    ("drop", "usual"),
    [
        (DENIED, False),
        (Drop("QUEUE_PURGE", "skb_queue_purge_reason", 0, "", "0x0000"), True),
        (Drop("NO_SOCKET", "tcp_v4_rcv", 0, "", "TCP", "10.0.0.1", 1, "10.0.0.2", 2), False),
        (Drop("NOT_SPECIFIED", "ip6_mc_input", 7, "eth0", "ICMPv6", "fe80::1", 0, "ff02::2"), True),
        (Drop("NOT_SPECIFIED", "ip_forward", 7, "eth0", "UDP", "10.0.0.1", 1, "10.0.0.2", 2), False),
    ],
)
def test_what_is_usual(drop, usual):
    """Ends of sockets and groups of neighbours are left out unless asked for; a packet of a flow never is."""
    assert drops.is_usual(drop) == usual


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--every", "0"], "--every: must be greater than 0, is 0"),
        (["--for", "-1"], "--for: must be greater than 0, is -1"),
        (["--netns", "no-such-namespace"], "--netns: no network namespace 'no-such-namespace'"),
        (["--objects", "/nonexistent"], "/nonexistent"),
    ],
)
def test_bad_usage(capsys, words, message):
    """Bad words are refused before anything is traced."""
    assert main(["drops", *words]) == 2
    assert message in capsys.readouterr().err
