// SPDX-License-Identifier: Apache-2.0
/*
 * A generator and a sink of TCP packets, both inside the kernel, so that what is measured in between is the kernel's own path.
 *
 *   generate (XDP, run by BPF_PROG_TEST_RUN with live frames)         count (tc ingress, far end of every link)
 *     writes the whole frame anew, source from a counter   -- node -->  counts by destination, drops
 *
 * The frame is written whole for each packet because live frames are recycled: what comes back has been through the stack,
 * which changed its MACs, TTL, addresses and checksums.
 *
 * Checksums are right, as conntrack verifies TCP's: user space sums up everything but the addresses and the source port, which
 * are added here.
 * Words are summed as they lie in memory; the one's complement sum does not mind the byte order (RFC 1071).
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

struct segment {
	struct ethhdr eth;
	struct iphdr ip;
	struct tcphdr tcp;
} __attribute__((packed));

/* How to make packets; struct.Struct PLAN in bench/injection.py. */
struct plan {
	struct segment frame;	/* 54 bytes; addresses, source port and both checksums are filled in here */
	__u8 varies;		/* 1: every packet is another flow, 0: all are the flow of number `next` */
	__u8 bits;		/* flows take 2^bits addresses in turn, at most 2^10 ... */
	__u8 stride;		/* ... so far apart ... */
	__u8 pad[3];
	__u32 ip_sum, tcp_sum;	/* of everything else */
	__u32 first_source;	/* ... from here on; host order */
	__u32 next;		/* number of the next flow */
	__u32 destinations[1024];	/* network order; flows take them in turn */
};

/* What arrived; struct.Struct SEEN in bench/injection.py. Host order throughout. */
struct seen {
	__u64 expected, others;		/* packets that arrived where they should, and elsewhere */
	__u32 first, last;		/* where they should: addresses from first to last ... */
	__u32 port;			/* ... and this port */
	__u32 address;			/* where the latest expected one went */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct plan);
} plans SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct seen);
} sightings SEC(".maps");

static __always_inline __u16 folded(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

SEC("xdp")
int generate(struct xdp_md *ctx)
{
	struct segment *packet = (void *)(long)ctx->data;
	__u32 key = 0, bits, source, destination, halves;
	struct plan *plan = bpf_map_lookup_elem(&plans, &key);

	if (!plan || (void *)(packet + 1) > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	__builtin_memcpy(packet, &plan->frame, sizeof(*packet));
	bits = plan->bits & 15;
	source = bpf_htonl(plan->first_source + (plan->next & ((1 << bits) - 1)) * plan->stride);
	destination = plan->destinations[plan->next & 1023];
	packet->ip.saddr = source;
	packet->ip.daddr = destination;
	packet->tcp.source = bpf_htons(1024 + (plan->next >> bits) % 64000);
	halves = (source & 0xffff) + (source >> 16) + (destination & 0xffff) + (destination >> 16);
	packet->ip.check = folded(plan->ip_sum + halves);
	packet->tcp.check = folded(plan->tcp_sum + halves + packet->tcp.source);
	plan->next += plan->varies;	/* one CPU generates: nothing races */
	return XDP_PASS;
}

SEC("tc")
int count(struct __sk_buff *skb)
{
	struct segment *packet = (void *)(long)skb->data;
	__u32 key = 0, address;
	struct seen *seen = bpf_map_lookup_elem(&sightings, &key);

	if (!seen || skb->protocol != bpf_htons(ETH_P_IP) || (void *)(packet + 1) > (void *)(long)skb->data_end)
		return TC_ACT_SHOT;	/* the links' own chatter in IPv6 */
	if (packet->ip.protocol != IPPROTO_TCP)
		return TC_ACT_SHOT;	/* and in IGMP */
	address = bpf_ntohl(packet->ip.daddr);
	if (address >= seen->first && address <= seen->last && bpf_ntohs(packet->tcp.dest) == seen->port) {
		seen->expected++;
		seen->address = address;
	} else {
		seen->others++;
	}
	return TC_ACT_SHOT;
}

char _license[] SEC("license") = "GPL";
