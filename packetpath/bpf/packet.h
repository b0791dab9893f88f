/* Packets of TCP and UDP as the short lane takes them: read, and written so that they are another's.
 *
 * What cannot go there is not read to the end: fragments, IP options and extension headers, a last hop, other protocols. Addresses
 * and ports are replaced by the kernel's helpers, which know which sums are left to a card. Source: RFC 791, 8200, 1141, 9293. */
#ifndef NODEPLANE_BPF_PACKET_H
#define NODEPLANE_BPF_PACKET_H

#include "wire.h"

struct flow {
	struct address from, to;
	__be16 from_port, to_port;
	__u32 link; /* where it came in */
	__u8 protocol, unused[3];
};

/* What a packet becomes, and where it goes then. */
struct way {
	struct address from, to;
	__be16 from_port, to_port;
	__u32 generation;
	__u64 until;
	__u32 link;
	__u16 mtu;
	__u8 kind, v6;
	__u8 macs[12];
	__u32 unused;
};

/* Where a TCP packet stands in a connection's life. */
enum stage {
	BETWEEN, /* also every packet of UDP */
	OPENS,   /* SYN */
	AGREES,  /* SYN, ACK */
	ENDS,    /* FIN */
	REFUSES, /* RST */
};

struct packet {
	struct flow flow;
	__u32 l4;  /* where the next header begins */
	__u32 l3_bytes;
	__u8 v6, stage, tos;
};

/* Read the next header, which begins at `l4`; 0 if the packet has to go the long way. */
always_inline int read_ports(struct __sk_buff *skb, struct packet *p, const __u32 l4)
{
	const struct udphdr *udp;
	const struct tcphdr *tcp;
	void *data = reach(skb, l4 + sizeof *udp);

	if (!data)
		return 0;
	udp = data + l4;
	p->l4 = l4;
	p->flow.link = skb->ifindex;
	p->flow.from_port = udp->source;
	p->flow.to_port = udp->dest;
	if (p->flow.protocol == IPPROTO_UDP)
		return 1;
	data = reach(skb, l4 + sizeof *tcp);
	if (p->flow.protocol != IPPROTO_TCP || !data)
		return 0;
	tcp = data + l4;
	p->stage = tcp->rst ? REFUSES : tcp->fin ? ENDS : !tcp->syn ? BETWEEN : tcp->ack ? AGREES : OPENS;
	return 1;
}

/* Read a packet; 0 if it has to go the long way. */
always_inline int read(struct __sk_buff *skb, struct packet *p)
{
	const struct ipv6hdr *ip6;
	const struct iphdr *ip;
	void *data;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		data = reach(skb, ETH_HLEN + sizeof *ip);
		if (!data)
			return 0;
		ip = data + ETH_HLEN;
		if (ip->version != 4 || ip->ihl != 5 || ip->ttl <= 1 || ip->frag_off & bpf_htons(IP_FRAGMENT))
			return 0;
		p->flow.from = mapped(ip->saddr);
		p->flow.to = mapped(ip->daddr);
		p->flow.protocol = ip->protocol;
		p->tos = ip->tos;
		p->l3_bytes = bpf_ntohs(ip->tot_len);
		return read_ports(skb, p, ETH_HLEN + sizeof *ip);
	}
	if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		data = reach(skb, ETH_HLEN + sizeof *ip6);
		if (!data)
			return 0;
		ip6 = data + ETH_HLEN;
		if (ip6->version != 6 || ip6->hop_limit <= 1)
			return 0;
		p->flow.from = of6(&ip6->saddr);
		p->flow.to = of6(&ip6->daddr);
		p->flow.protocol = ip6->nexthdr;
		p->l3_bytes = bpf_ntohs(ip6->payload_len) + sizeof *ip6;
		p->v6 = 1;
		return read_ports(skb, p, ETH_HLEN + sizeof *ip6);
	}
	return 0;
}

/* One port and one address, with the sums over them. */
always_inline int replace(struct __sk_buff *skb, const struct packet *p, const struct address *old, const struct address *new,
			  __be16 old_port, __be16 new_port, const int is_source)
{
	const __u64 flags = p->flow.protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	const __u32 sum = p->l4 + (p->flow.protocol == IPPROTO_UDP ? offsetof(struct udphdr, check) : offsetof(struct tcphdr, check));
	__u32 at;
	__s64 diff;

	if (!same(old, new)) {
		if (p->v6) {
			at = ETH_HLEN + (is_source ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr));
			diff = bpf_csum_diff((__be32 *)old, sizeof *old, (__be32 *)new, sizeof *new, 0);
			if (diff < 0 || bpf_l4_csum_replace(skb, sum, 0, diff, flags | BPF_F_PSEUDO_HDR) ||
			    bpf_skb_store_bytes(skb, at, new, sizeof *new, 0))
				return -1;
		} else {
			at = ETH_HLEN + (is_source ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr));
			if (bpf_l4_csum_replace(skb, sum, old->word[3], new->word[3], flags | BPF_F_PSEUDO_HDR | 4) ||
			    bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), old->word[3], new->word[3], 4) ||
			    bpf_skb_store_bytes(skb, at, &new->word[3], 4, 0))
				return -1;
		}
	}
	if (old_port != new_port) {
		if (bpf_l4_csum_replace(skb, sum, old_port, new_port, flags | 2) ||
		    bpf_skb_store_bytes(skb, p->l4 + (is_source ? 0 : 2), &new_port, 2, 0))
			return -1;
	}
	return 0;
}

/* One hop less. */
always_inline int step(struct __sk_buff *skb, const struct packet *p)
{
	const __u32 limit = ETH_HLEN + offsetof(struct ipv6hdr, hop_limit);
	struct iphdr *ip;
	void *data;
	__u32 sum;
	__u8 hops;

	if (p->v6) { /* no sum in the header makes up for it, so the card's sum over all of the packet has to follow */
		if (bpf_skb_load_bytes(skb, limit, &hops, sizeof hops))
			return -1;
		hops--;
		return bpf_skb_store_bytes(skb, limit, &hops, sizeof hops, BPF_F_RECOMPUTE_CSUM);
	}
	data = reach(skb, ETH_HLEN + sizeof *ip);
	if (!data)
		return -1;
	ip = data + ETH_HLEN;
	sum = ip->check + bpf_htons(0x0100); /* RFC 1141 */
	ip->check = sum + (sum >= 0xffff);
	ip->ttl--;
	return 0;
}

/* Whether the next link takes it in one piece; of what is still to be segmented, each piece. */
always_inline int is_short(const struct __sk_buff *skb, const struct packet *p, const struct way *way)
{
	__u32 headers = p->l4 - ETH_HLEN + (p->flow.protocol == IPPROTO_UDP ? sizeof(struct udphdr) : 60);

	return skb->gso_size ? skb->gso_size + headers <= way->mtu : p->l3_bytes <= way->mtu;
}

#endif
