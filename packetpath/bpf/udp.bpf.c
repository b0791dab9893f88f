/* The UDP tunnel in the kernel: wraps what leaves through flannel0, unwraps what comes in from peers, and leaves the rest.
 *
 *     pod --> route Network dev flannel0 --> encap --> eth0 --> [IP | UDP 8285 | the packet itself]
 *                                              '-- no peer, TTL over, too big, ... --> TUN --> forwarder (userspace), which answers
 *
 *     pod <-- flannel0 <-- decap <-- eth0
 *                            '-- fragments, TTL over, ... --> UDP socket --> forwarder
 *
 * A peer is believed if the inner source is behind its outer address (places.h). The outer UDP checksum is 0: the inner packet has
 * its own, over its addresses as well, and the outer addresses are compared with a table. Allowed for IPv4, and for tunnels over
 * IPv6 by RFC 6935 and 6936; receivers in user space need UDP_NO_CHECK6_RX there. It also keeps the card's GRO from putting several
 * datagrams into one for the forwarder's socket (udp_gro_receive_segment), which would be past unwrapping here.
 *
 * What is unwrapped has come in through flannel0 as far as rules and rp_filter can see, as with the forwarder.
 *
 * Source: flannel pkg/backend/udp/proxy_amd64.c (format, TTL); net/core/filter.c (bpf_skb_adjust_room, bpf_redirect_neigh). */
#include "checksum.h"
#include "places.h"

enum {
	SENT_PACKETS,
	SENT_BYTES,
	RECEIVED_PACKETS,
	RECEIVED_BYTES,
	PASSED_OUT,
	PASSED_IN,
	UNFINISHED,
	UNKNOWN_PEER,
	WRONG_SOURCE,
	MALFORMED,
	SEND_ERRORS,
	COUNTERS,
};

#include "counters.h"

#define HEARD 3000000000ULL /* nanoseconds for which a peer is known to unwrap in its kernel */
#define REFRESH 500000000ULL
#define SPARE 8 /* bytes more than the outer headers: `unwrap_summed` */
#define SOURCE_PORTS 0xc000 /* from 49152 on, the dynamic ports of RFC 6335, by the flow's hash: for ECMP and queues */

struct settings {
	__u8 build[8]; /* of which version of this file the programs are: for those who find them later */
	struct address local4, local6; /* outer source; zero: no tunnel in this family */
	__u32 uplink, tunnel;	       /* interface indices */
	__be16 port;
	__u8 uplink_header, tunnel_header; /* whether packets start with an Ethernet header there */
	__u8 finishes;			   /* the uplink leaves no checksum unfinished */
	__u8 unused[3];
	__u32 merge; /* interface index of the way that merges segments; 0: there is none */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} settings SEC(".maps");

struct outer4 {
	struct iphdr ip;
	struct udphdr udp;
};

struct outer6 {
	struct ipv6hdr ip;
	struct udphdr udp;
};

/* What decides about an IP packet. */
struct packet {
	struct address from, to;
	__u32 bytes; /* by its header */
	__u8 protocol, hops;
	__u8 plain; /* neither options, nor a fragment */
	__u8 fragment;
};

always_inline const struct settings *get_settings(void)
{
	__u32 only = 0;

	return bpf_map_lookup_elem(&settings, &only);
}

/* Read the header at `start`; 0 if it is none of this family. The caller has made sure that it can be reached. */
always_inline int read_packet(const void *start, struct packet *p, const int v6)
{
	if (v6) {
		const struct ipv6hdr *ip = start;

		if (ip->version != 6)
			return 0;
		*p = (struct packet){of6(&ip->saddr), of6(&ip->daddr), sizeof *ip + bpf_ntohs(ip->payload_len), ip->nexthdr, ip->hop_limit, 1, 0};
	} else {
		const struct iphdr *ip = start;

		if (ip->version != 4 || ip->ihl < 5 || bpf_ntohs(ip->tot_len) < ip->ihl * 4)
			return 0;
		*p = (struct packet){mapped(ip->saddr), mapped(ip->daddr), bpf_ntohs(ip->tot_len), ip->protocol, ip->ttl, ip->ihl == 5, 0};
		p->fragment = !!(ip->frag_off & bpf_htons(IP_FRAGMENT));
	}
	return 1;
}

/* -- wrapping ------------------------------------------------------------------------------------------------------------------ */

/* Whether the peer's kernel takes this as it is: it sends without outer checksums, so it unwraps before any socket. */
always_inline int is_trusted(const struct settings *s, const struct address *peer)
{
	const struct node *node;

	if (s->finishes)
		return 1;
	node = bpf_map_lookup_elem(&nodes, peer);
	return node && bpf_ktime_get_coarse_ns() - node->heard < HEARD;
}

/* See that the inner checksum is complete. 0: it is; 1: the forwarder shall do it; -1: the packet is spoilt.
 *
 * Payload of TCP always takes the forwarder's way, lest a short last segment overtake it; what carries none may overtake. */
always_inline int finish(struct __sk_buff *skb, const struct packet *p, const __u32 l2, const __u32 l3)
{
	__u32 l4 = l2 + l3, bytes = p->bytes - l3;
	__u8 header[18] = {};
	const __u8 tcp = p->protocol == IPPROTO_TCP;
	__u16 field;

	if (skb->gso_size || p->protocol == IPPROTO_SCTP)
		return 1;
	if (p->fragment || p->protocol == IPPROTO_ICMP || p->protocol == IPPROTO_ICMPV6)
		return 0;
	if ((!tcp && p->protocol != IPPROTO_UDP) || !p->plain)
		return l3 == 40 || !p->plain; /* extension headers and options may stand before TCP and UDP */
	if (p->bytes < l3 || p->bytes != skb->len - l2 || bpf_skb_load_bytes(skb, l4, header, tcp ? 18 : 8))
		return 1;
	field = tcp ? *(__u16 *)(header + 16) : *(__u16 *)(header + 6);
	if ((!tcp && !field) || !is_unfinished(field, pseudo_sum(&p->from, &p->to, p->protocol, bytes)))
		return 0;
	if (tcp && (bytes > (header[12] >> 4) * 4 || header[13] & 5)) /* payload, FIN, RST */
		return 1;
	return sum_up(skb, l4, bytes, l4 + (tcp ? 16 : 6), !tcp) || forget_offload(skb, l2, l3) ? -1 : 0;
}

/* Whether it fits through the uplink once wrapped. A superpacket's segments count. */
always_inline int fits(struct __sk_buff *skb, const struct settings *s, const struct packet *p, const __u32 l2, const __u32 l3)
{
	__u32 mtu = skb->len - l2, size = skb->gso_size;
	__u8 words = 2 << 4; /* UDP's header */

	if (mtu + l3 + 8 > 0xffff)
		return 0;
	if (bpf_check_mtu(skb, s->uplink, &mtu, l3 + 8, 0))
		return 0;
	if (!size)
		return 1; /* else the call would have said no */
	if (p->protocol == IPPROTO_TCP)
		bpf_skb_load_bytes(skb, l2 + l3 + 12, &words, 1);
	return size + (words >> 4) * 4 + 2 * l3 + 8 <= mtu;
}

always_inline int wrap4(struct __sk_buff *skb, const struct settings *s, __u32 peer, const __u32 l2, __u32 bytes, __u16 source)
{
	struct outer4 *outer = data_of(skb) + l2;
	__u16 *half = (void *)outer;
	__u32 sum = 0;
	int i;

	if ((void *)(outer + 1) > end_of(skb))
		return -1;
	/* No DF: a smaller MTU on the way then makes fragments, where its ICMP would reach nobody who could act on it. */
	outer->ip = (struct iphdr){.version = 4, .ihl = 5, .tot_len = bpf_htons(bytes + sizeof *outer), .ttl = 64};
	outer->ip.id = bpf_get_prandom_u32();
	outer->ip.protocol = IPPROTO_UDP;
	outer->ip.saddr = s->local4.word[3];
	outer->ip.daddr = peer;
	for (i = 0; i < 10; i++)
		sum += half[i];
	outer->ip.check = ~folded(sum);
	outer->udp = (struct udphdr){source, s->port, bpf_htons(bytes + sizeof outer->udp), 0};
	return 0;
}

always_inline int wrap6(struct __sk_buff *skb, const struct settings *s, const struct address *peer, const __u32 l2, __u32 bytes,
			__u16 source, __u32 flow)
{
	struct outer6 *outer = data_of(skb) + l2;

	if ((void *)(outer + 1) > end_of(skb))
		return -1;
	*(__be32 *)&outer->ip = bpf_htonl(6u << 28 | (flow & 0xfffff));
	outer->ip.payload_len = bpf_htons(bytes + sizeof outer->udp);
	outer->ip.nexthdr = IPPROTO_UDP;
	outer->ip.hop_limit = 64;
	__builtin_memcpy(&outer->ip.saddr, &s->local6, sizeof s->local6);
	__builtin_memcpy(&outer->ip.daddr, peer, sizeof *peer);
	outer->udp = (struct udphdr){source, s->port, bpf_htons(bytes + sizeof outer->udp), 0};
	return 0;
}

/* One hop less, in the header and for IPv4 in its checksum (RFC 1624). */
always_inline int hop_out(struct __sk_buff *skb, const __u32 l2, const int v6)
{
	void *start = data_of(skb) + l2;

	if (start + (v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr)) > end_of(skb))
		return -1;
	if (v6) {
		((struct ipv6hdr *)start)->hop_limit--;
	} else {
		struct iphdr *ip = start;
		__u32 check = ip->check + bpf_htons(0x0100);

		ip->check = check + (check >= 0xffff);
		ip->ttl--;
	}
	return 0;
}

always_inline int encapsulate(struct __sk_buff *skb, const struct settings *s, const __u32 l2, const int v6)
{
	const __u32 l3 = v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	const __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
			    (v6 ? BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 : BPF_F_ADJ_ROOM_ENCAP_L3_IPV4);
	__u32 bytes = skb->len - l2, packets = segments(skb, bytes), flow;
	const struct place *place;
	struct packet p;
	__u16 source;
	void *start;
	int done;

	if (!(v6 ? s->local6.word[0] : s->local4.word[3]) || !(start = reach(skb, l2 + l3)) || !read_packet(start + l2, &p, v6))
		return passed_on(PASSED_OUT);
	place = place_of(&p.to);
	if (!place || place->kind != PEER || p.hops <= 1 || (!skb->gso_size && p.bytes > bytes) || !fits(skb, s, &p, l2, l3))
		return passed_on(PASSED_OUT);
	if (!is_trusted(s, &place->node)) {
		done = finish(skb, &p, l2, l3);
		if (done < 0)
			return dropped(SEND_ERRORS);
		if (done) {
			count(UNFINISHED, 1);
			return passed_on(PASSED_OUT);
		}
	}
	flow = bpf_get_hash_recalc(skb);
	source = bpf_htons(SOURCE_PORTS | (flow & 0x3fff));
	/* Nothing of the packet was changed so far, unless `finish` was right to: wrapped already by a pod, it is the forwarder's. */
	if (bpf_skb_adjust_room(skb, l3 + 8, BPF_ADJ_ROOM_MAC, flags))
		return passed_on(PASSED_OUT);
	if (hop_out(skb, l2 + l3 + 8, v6) || (v6 ? wrap6(skb, s, &place->node, l2, bytes, source, flow)
						 : wrap4(skb, s, place->node.word[3], l2, bytes, source)))
		return dropped(SEND_ERRORS);
	count(SENT_PACKETS, packets);
	count(SENT_BYTES, bytes);
	if (!l2 && bpf_skb_change_head(skb, ETH_HLEN, 0)) /* bpf_redirect_neigh wants room for one, and fills it */
		return dropped(SEND_ERRORS);
	skb->mark = 0; /* it was the inner packet's, and must not choose the outer one's route */
	return bpf_redirect_neigh(s->uplink, 0, 0, 0);
}

always_inline int encap_family(struct __sk_buff *skb, const struct settings *s, const __u32 l2)
{
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return encapsulate(skb, s, l2, 0);
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return encapsulate(skb, s, l2, 1);
	return passed_on(PASSED_OUT);
}

SEC("tc")
int np_udp_encap(struct __sk_buff *skb)
{
	const struct settings *s = get_settings();

	if (!s)
		return NEXT;
	return s->tunnel_header ? encap_family(skb, s, ETH_HLEN) : encap_family(skb, s, 0);
}

/* -- unwrapping ---------------------------------------------------------------------------------------------------------------- */

/* A packet without an outer checksum comes from a peer that wraps in its kernel, and so unwraps there as well. One that is larger
 * than the MTU says that the way passes such. Return whether it did lately. */
always_inline int learn(struct node *node, int unsummed, int large)
{
	__u64 now = bpf_ktime_get_coarse_ns();

	if (unsummed && now - node->heard > REFRESH)
		node->heard = now;
	if (large && now - node->whole > REFRESH)
		node->whole = now;
	return now - node->whole < HEARD;
}

/* Take a hop off the inner packet, in place; its sum as the card may have told it stays right. */
always_inline int hop_in(struct __sk_buff *skb, const __u32 start, const struct packet *p, __u16 check, const int v6)
{
	if (v6) {
		__u8 hops = p->hops - 1;

		return bpf_skb_store_bytes(skb, start + 7, &hops, 1, BPF_F_RECOMPUTE_CSUM);
	} else {
		__u32 sum = check + bpf_htons(0x0100);
		struct {
			__u8 ttl, protocol;
			__u16 check;
		} part = {p->hops - 1, p->protocol, sum + (sum >= 0xffff)};

		return bpf_skb_store_bytes(skb, start + 8, &part, sizeof part, 0);
	}
}

/* Unwrap a packet whose outer checksum may have been left unfinished by a virtual link. The kernel would go on believing that it
 * has to be finished, at a place that is gone; it forgets that when what is taken off reaches beyond the place (checksum.h), which
 * is the UDP header's start, seen from behind the Ethernet header's length: 8 bytes more do. */
always_inline int unwrap_summed(struct __sk_buff *skb, const __u32 l2, const __u32 room)
{
	__u8 saved[SPARE];

	return bpf_skb_load_bytes(skb, l2 + room, saved, SPARE) ||
	       bpf_skb_adjust_room(skb, -(__s32)(room + SPARE), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO) ||
	       bpf_skb_adjust_room(skb, SPARE, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO) ||
	       bpf_skb_store_bytes(skb, l2, saved, SPARE, BPF_F_RECOMPUTE_CSUM);
}

always_inline int decapsulate(struct __sk_buff *skb, const struct settings *s, const __u32 l2, const int v6)
{
	const __u32 l3 = v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr), room = l3 + sizeof(struct udphdr);
	struct packet outer, inner;
	struct place *place;
	struct udphdr *udp;
	struct node *node;
	__u32 payload;
	__u16 check;
	void *start;
	int whole, summed;

	start = reach(skb, l2 + room);
	if (!start)
		return NEXT;
	start += l2;
	udp = start + l3;
	if (!read_packet(start, &outer, v6) || outer.protocol != IPPROTO_UDP || !outer.plain || outer.fragment ||
	    udp->dest != s->port || !same(&outer.to, v6 ? &s->local6 : &s->local4))
		return NEXT;
	node = bpf_map_lookup_elem(&nodes, &outer.from);
	if (!node)
		return dropped(UNKNOWN_PEER);
	start = reach(skb, l2 + room + l3);
	if (!start)
		return dropped(MALFORMED);
	start += l2;
	udp = start + l3;
	payload = bpf_ntohs(udp->len) - sizeof *udp;
	if (!read_packet(start + room, &inner, v6))
		return dropped(MALFORMED);
	if (skb->gso_size) {
		payload = skb->len - l2 - room; /* a superpacket's outer lengths are settled when it is cut */
		if (inner.bytes != payload)
			return passed_on(PASSED_IN); /* several datagrams that GRO made one for the forwarder's socket */
	} else if (outer.bytes > skb->len - l2 || payload > outer.bytes - room || inner.bytes > payload) {
		return dropped(MALFORMED);
	}
	place = place_of(&inner.from);
	if (!place || place->kind != PEER || !same(&place->node, &outer.from))
		return dropped(WRONG_SOURCE);
	if (inner.hops <= 1)
		return passed_on(PASSED_IN);
	summed = !!udp->check;
	if (summed && inner.bytes < l3 + SPARE)
		return passed_on(PASSED_IN); /* the kernel wants an IP header's worth of bytes to remain */
	whole = learn(node, !summed, !!skb->gso_size);
	check = v6 ? 0 : ((struct iphdr *)(start + room))->check;
	if (hop_in(skb, l2 + room, &inner, check, v6))
		return dropped(MALFORMED);
	count(RECEIVED_PACKETS, segments(skb, payload));
	if (summed ? unwrap_summed(skb, l2, room) : bpf_skb_adjust_room(skb, -(__s32)room, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
		return dropped(MALFORMED);
	count(RECEIVED_BYTES, payload);
	if (s->merge && inner.protocol == IPPROTO_TCP && !whole)
		return bpf_redirect(s->merge, 0);
	return bpf_redirect(s->tunnel, BPF_F_INGRESS);
}

always_inline int decap_family(struct __sk_buff *skb, const struct settings *s, const __u32 l2)
{
	if (skb->protocol == bpf_htons(ETH_P_IP) && s->local4.word[3])
		return decapsulate(skb, s, l2, 0);
	if (skb->protocol == bpf_htons(ETH_P_IPV6) && s->local6.word[0])
		return decapsulate(skb, s, l2, 1);
	return NEXT;
}

SEC("tc")
int np_udp_decap(struct __sk_buff *skb)
{
	const struct settings *s = get_settings();

	if (!s || skb->vlan_present || skb->pkt_type)
		return NEXT;
	return s->uplink_header ? decap_family(skb, s, ETH_HLEN) : decap_family(skb, s, 0);
}

/* At the far end of the way that merges segments: what comes out there has come in through the tunnel. */
SEC("tc")
int np_udp_arrive(struct __sk_buff *skb __attribute__((unused)))
{
	const struct settings *s = get_settings();

	return s ? bpf_redirect(s->tunnel, BPF_F_INGRESS) : TC_ACT_SHOT;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
