"""Packets that the kernel drops, with the reason it gives and the flow they were of; and how long some things take. Through bcc.

    skb:kfree_skb          reason, place, packet --> flow, link, namespace    counted in the kernel by all of these; read and cleared here
    net:net_dev_queue  -.
    net:netif_receive_skb'- the same packet       from one end of a veth to being received at the other
    sock:inet_sock_set_state                      from SYN to the answer, by where to

Only arguments of tracepoints are taken from the headers that bcc compiles with; what is read of packets and links lies where the
running kernel says it does (``btf.py``). It sees the whole machine, every network namespace. A counter's place is kept by use, so that a
flood from many addresses costs a bounded table and forgets the oldest.

Source: include/trace/events/{skb,net,sock}.h, include/net/dropreason-core.h, struct sk_buff, struct net_device.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any

import msgspec

from kernelstate.errors import MissingFeatureError
from kernelstate.linux import btf, tracing

FLOWS = 16384
SLOTS = 40
"""Powers of two of nanoseconds: up to a quarter of an hour."""
PROTOCOLS = {0: "HOPOPT", 1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}
PORTED = {"TCP", "UDP", "SCTP"}
FIELDS = (
    ("sk_buff", "head"),
    ("sk_buff", "network_header"),
    ("sk_buff", "dev"),
    ("net_device", "name"),
    ("net_device", "nd_net.net"),
    ("net", "ns.inum"),
)

DROPS = """
enum skb_drop_reason { NODEPLANE_UNUSED };  /* named in the event's arguments, and not in headers that are older */

struct flow_key {
    u64 location;
    u32 reason, netns;
    u32 src[4], dst[4];
    u16 sport, dport;
    u16 protocol;
    u8 family, l4;
    char dev[16];
};
BPF_TABLE("lru_hash", struct flow_key, u64, drops, FLOWS);

#define READ(to, from) bpf_probe_read_kernel(&(to), sizeof(to), (void *)(from))

TRACEPOINT_PROBE(skb, kfree_skb)
{
    struct flow_key key = {};
    u64 skb = (u64)args->skbaddr, head = 0, dev = 0, net = 0, one = 1, at, *count;
    u16 network = 0, length = 0;
    u8 first = 0;

    key.reason = args->reason;
    key.location = (u64)args->location;
    key.protocol = args->protocol;
    READ(dev, skb + SK_BUFF_DEV);
    if (dev) {
        bpf_probe_read_kernel(key.dev, sizeof(key.dev), (void *)(dev + NET_DEVICE_NAME));
        READ(net, dev + NET_DEVICE_NET);
        if (net)
            READ(key.netns, net + NET_INUM);
    }
    READ(head, skb + SK_BUFF_HEAD);
    READ(network, skb + SK_BUFF_NETWORK_HEADER);
    at = head + network;
    if (head && (key.protocol == 0x0800 || key.protocol == 0x86dd)) {
        READ(first, at);
        if (key.protocol == 0x0800 && first >> 4 == 4) {
            key.family = 4;
            READ(key.l4, at + 9);
            READ(key.src[0], at + 12);
            READ(key.dst[0], at + 16);
            length = (first & 15) * 4;
        } else if (key.protocol == 0x86dd && first >> 4 == 6) {
            key.family = 6;
            READ(key.l4, at + 6);
            READ(key.src, at + 8);
            READ(key.dst, at + 24);
            length = 40;
        }
        if (key.l4 == 6 || key.l4 == 17 || key.l4 == 132) {
            READ(key.sport, at + length);
            READ(key.dport, at + length + 2);
        }
    }
    count = drops.lookup(&key);  /* increment() adds nothing to a table that forgets the oldest */
    if (count)
        __sync_fetch_and_add(count, 1);
    else
        drops.update(&key, &one);
    return 0;
}
"""

LATENCY = """
struct where_key { u32 dst[4]; u16 dport; u8 family, slot; };
BPF_TABLE("lru_hash", u64, u64, queued, FLOWS);
BPF_TABLE("lru_hash", u64, u64, connecting, FLOWS);
BPF_ARRAY(hops, u64, SLOTS);
BPF_TABLE("lru_hash", struct where_key, u64, connects, FLOWS);

static u32 slot_of(u64 ns)
{
    u64 slot = bpf_log2l(ns);
    return slot < SLOTS ? slot : SLOTS - 1;
}

TRACEPOINT_PROBE(net, net_dev_queue)
{
    u64 skb = (u64)args->skbaddr, now = bpf_ktime_get_ns();
    queued.update(&skb, &now);
    return 0;
}

TRACEPOINT_PROBE(net, netif_receive_skb)
{
    u64 skb = (u64)args->skbaddr, *since = queued.lookup(&skb);
    if (since) {
        hops.increment(slot_of(bpf_ktime_get_ns() - *since));
        queued.delete(&skb);
    }
    return 0;
}

TRACEPOINT_PROBE(sock, inet_sock_set_state)
{
    u64 sk = (u64)args->skaddr, now = bpf_ktime_get_ns(), one = 1, *since, *count;
    struct where_key key = {};
    if (args->protocol != 6)
        return 0;
    if (args->newstate == 2) {  /* TCP_SYN_SENT */
        connecting.update(&sk, &now);
        return 0;
    }
    since = args->oldstate == 2 ? connecting.lookup(&sk) : 0;
    if (since && args->newstate == 1) {  /* TCP_ESTABLISHED */
        key.family = args->family == 2 ? 4 : 6;
        if (key.family == 4)
            __builtin_memcpy(key.dst, args->daddr, 4);
        else
            __builtin_memcpy(key.dst, args->daddr_v6, 16);
        key.dport = args->dport;
        key.slot = slot_of(now - *since);
        count = connects.lookup(&key);
        if (count)
            __sync_fetch_and_add(count, 1);
        else
            connects.update(&key, &one);
    }
    if (since)
        connecting.delete(&sk);
    return 0;
}
"""


class Drop(msgspec.Struct, frozen=True):
    """Packets of one flow that were dropped at one place for one reason. What a packet does not have is empty or 0."""

    reason: str
    place: str
    """The kernel's function."""
    netns: int
    """The inode of the network namespace; 0: the packet was on no link."""
    dev: str
    protocol: str
    """TCP, UDP, SCTP, ICMP, ICMPv6; else the number of the protocol or of the EtherType in hexadecimal."""
    source: str = ""
    source_port: int = 0
    destination: str = ""
    destination_port: int = 0
    packets: int = 1


class Latency(msgspec.Struct, frozen=True):
    """How often something took between 2^i and 2^(i+1) nanoseconds, for each i."""

    what: str
    slots: tuple[int, ...]


class DropTrace:
    """Counts from the moment it is made. Moves this process into a mount namespace of its own, once."""

    def __init__(self, *, latency: bool = False) -> None:
        """``latency``: look at times as well. Raises MissingFeatureError, KernelRefusedError."""
        try:
            from bcc import BPF  # noqa: PLC0415  half a second
        except ImportError as error:
            raise MissingFeatureError("bcc", "python3-bpfcc is not installed") from error
        tracing.prepare()
        text = tracing.event_format("skb/kfree_skb")
        if "reason;" not in text:
            raise MissingFeatureError("drop reasons", "the event skb:kfree_skb has them since Linux 5.17")
        self._reasons = tracing.symbols(text, "reason")
        names = [
            f"-D{name.upper()}_{field.split('.')[-1].upper()}={at}"
            for (name, field), at in zip(FIELDS, btf.offsets(FIELDS), strict=True)
        ]
        flags = [*names, f"-DFLOWS={FLOWS}", f"-DSLOTS={SLOTS}", "-Wno-macro-redefined"]
        try:
            self._bpf: Any = BPF(text=DROPS + (LATENCY if latency else ""), cflags=flags)
        except Exception as error:  # bcc raises nothing more special
            raise MissingFeatureError("tracing", f"bcc could not compile or attach: {error}") from error
        self._latency = latency

    def close(self) -> None:
        """Stop counting."""
        self._bpf.cleanup()

    def read(self) -> list[Drop]:
        """Return what was dropped since the last call, the most first."""
        found = [self._drop(key, int(count)) for key, count in self._bpf["drops"].items_lookup_and_delete_batch()]
        return sorted(found, key=lambda one: -one.packets)

    def _drop(self, key: Any, packets: int) -> Drop:
        protocol = PROTOCOLS.get(key.l4, str(key.l4)) if key.family else f"0x{key.protocol:04x}"
        return Drop(
            reason=self._reasons.get(key.reason, str(key.reason)),
            place=self._bpf.ksym(key.location).decode(errors="replace").split("+")[0],
            netns=key.netns,
            dev=bytes(key.dev).split(b"\0")[0].decode(errors="replace"),
            protocol=protocol,
            source=_address(key.family, key.src),
            source_port=_port(key.sport) if protocol in PORTED else 0,
            destination=_address(key.family, key.dst),
            destination_port=_port(key.dport) if protocol in PORTED else 0,
            packets=packets,
        )

    def latencies(self) -> Iterator[Latency]:
        """Yield what is known of times since the beginning: hops over a link, then connections by where to, the most first."""
        if not self._latency:
            return
        yield Latency("from a link's queue to being received", tuple(self._bpf["hops"][i].value for i in range(SLOTS)))
        places: dict[str, list[int]] = {}
        for key, count in self._bpf["connects"].items():
            address = _address(key.family, key.dst)
            name = f"[{address}]:{key.dport}" if key.family == 6 else f"{address}:{key.dport}"
            places.setdefault(name, [0] * SLOTS)[key.slot] += count.value
        for name, slots in sorted(places.items(), key=lambda item: -sum(item[1])):
            yield Latency(f"connect to {name}", tuple(slots))


def _address(family: int, words: Any) -> str:
    if family == 0:
        return ""
    data = bytes(words)
    return str(ipaddress.IPv4Address(data[:4]) if family == 4 else ipaddress.IPv6Address(data))


def _port(raw: int) -> int:
    return int.from_bytes(raw.to_bytes(2, "little"), "big")
