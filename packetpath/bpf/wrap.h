/* Wrapping: a pod's packet, at the egress of flannel0, into a datagram to the node that has its destination. */
#ifndef NODEPLANE_BPF_WRAP_H
#define NODEPLANE_BPF_WRAP_H

#include "checksum.h"
#include "udp.h"

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

#endif
