/* Unwrapping: a datagram to the tunnel, at the ingress of the uplink, if its packet may come in from there. */
#ifndef NODEPLANE_BPF_UNWRAP_H
#define NODEPLANE_BPF_UNWRAP_H

#include "udp.h"

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

#endif
