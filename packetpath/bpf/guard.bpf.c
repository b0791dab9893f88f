/* The source guard: at the uplink, pods' packets only from the node that has these pods.
 *
 *     eth0 <-- VXLAN of ours --> is the outer source a node? --> is the inner source behind it, or the node itself?   vxlan_...
 *          <-- anything else --> is the source a pod's? --> of a peer, and not of our own?                            plain_...
 *
 * Plain packets of a peer's pods are those of host-gw and DirectRouting, and of pods that speak to a node's own address; which node
 * put them on the wire does not show in them. A VXLAN packet for somebody else that is only forwarded here is left alone, and so
 * is a VNI that is not ours. Fragments: the first one has the headers and is judged (its inner header must be in it); the others
 * carry payload only, as the kernel drops overlapping ones.
 *
 * Source: RFC 7348; drivers/net/vxlan/vxlan_core.c; net/ipv4/ip_fragment.c; RFC 8200 section 4. */
#include "places.h"

enum counter {
	CHECKED,
	VXLAN_UNKNOWN_PEER,
	VXLAN_WRONG_SOURCE,
	VXLAN_MALFORMED,
	PLAIN_OWN_SOURCE,
	PLAIN_UNKNOWN_SOURCE,
	PLAIN_MALFORMED,
	COUNTERS,
};

#include "counters.h"

#define TUNNELS 4
#define EXTENSIONS 8
#define VXLAN_HEADER 8
#define VXLAN_HAS_VNI 0x08

struct tunnel {
	__be16 port;
	__u16 unused;
	__be32 vni; /* as in the header: the VNI in the upper three bytes */
};

struct settings {
	__u8 build[8]; /* as in udp.h */
	struct tunnel tunnels[TUNNELS];
	__u32 count;
	__u32 uplink; /* interface index */
	__u8 header;  /* whether packets start with an Ethernet header */
	__u8 unused[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} settings SEC(".maps");

/* An IP header that was read: where the next header is, and which. */
struct ip {
	struct address from, to;
	__u32 next;
	__u8 protocol, v6;
	__u8 later; /* a fragment that is not the first */
	__u8 broken;
};

always_inline void read4(const struct __sk_buff *skb, __u32 at, struct ip *ip)
{
	struct iphdr h;

	if (bpf_skb_load_bytes(skb, at, &h, sizeof h) || h.version != 4 || h.ihl < 5) {
		ip->broken = 1;
		return;
	}
	ip->from = mapped(h.saddr);
	ip->to = mapped(h.daddr);
	ip->protocol = h.protocol;
	ip->next = at + h.ihl * 4;
	ip->later = !!(h.frag_off & bpf_htons(IP_OFFSET));
}

/* Extension headers are passed over: with one of them in front, a packet would not look like UDP but be taken for it. */
always_inline void read6(const struct __sk_buff *skb, __u32 at, struct ip *ip, const int follow)
{
	struct ipv6hdr h;
	__u8 next[4];
	int i;

	if (bpf_skb_load_bytes(skb, at, &h, sizeof h) || h.version != 6) {
		ip->broken = 1;
		return;
	}
	ip->from = of6(&h.saddr);
	ip->to = of6(&h.daddr);
	ip->protocol = h.nexthdr;
	ip->next = at + sizeof h;
	ip->v6 = 1;
	for (i = 0; follow && i < EXTENSIONS; i++) {
		if (ip->protocol != IPPROTO_HOPOPTS && ip->protocol != IPPROTO_ROUTING && ip->protocol != IPPROTO_DSTOPTS &&
		    ip->protocol != IPPROTO_FRAGMENT)
			return;
		if (bpf_skb_load_bytes(skb, ip->next, next, sizeof next)) {
			ip->broken = 1;
			return;
		}
		if (ip->protocol == IPPROTO_FRAGMENT) {
			ip->later = !!(*(__be16 *)(next + 2) & bpf_htons(0xfff8));
			ip->next += 8;
		} else {
			ip->next += (next[1] + 1) * 8;
		}
		ip->protocol = next[0];
		if (ip->later)
			return;
	}
	ip->broken = follow; /* more of them than anybody sends */
}

/* Whether the packet is only forwarded here. Asked before a drop, not on the way of every packet. */
always_inline int is_for_others(struct __sk_buff *skb, const struct settings *s, const struct ip *ip)
{
	struct bpf_fib_lookup route = {.ifindex = s->uplink, .l4_protocol = IPPROTO_UDP};
	long found;

	if (ip->v6) {
		route.family = 10; /* AF_INET6 */
		__builtin_memcpy(route.ipv6_src, &ip->from, sizeof ip->from);
		__builtin_memcpy(route.ipv6_dst, &ip->to, sizeof ip->to);
	} else {
		route.family = 2; /* AF_INET */
		route.ipv4_src = ip->from.word[3];
		route.ipv4_dst = ip->to.word[3];
	}
	found = bpf_fib_lookup(skb, &route, sizeof route, 0);
	return found == BPF_FIB_LKUP_RET_SUCCESS || found == BPF_FIB_LKUP_RET_NO_NEIGH;
}

always_inline int refused(struct __sk_buff *skb, const struct settings *s, const struct ip *outer, __u32 why)
{
	return is_for_others(skb, s, outer) ? NEXT : dropped(why);
}

/* Look into a VXLAN packet whose VXLAN header is at `at`. */
always_inline int look_inside(struct __sk_buff *skb, const struct settings *s, const struct ip *outer, __u32 at)
{
	const struct place *place;
	struct ip inner = {};
	struct ethhdr frame;

	if (!bpf_map_lookup_elem(&nodes, &outer->from))
		return refused(skb, s, outer, VXLAN_UNKNOWN_PEER);
	at += VXLAN_HEADER;
	if (bpf_skb_load_bytes(skb, at, &frame, sizeof frame))
		return refused(skb, s, outer, VXLAN_MALFORMED);
	if (frame.h_proto == bpf_htons(ETH_P_IP))
		read4(skb, at + sizeof frame, &inner);
	else if (frame.h_proto == bpf_htons(ETH_P_IPV6))
		read6(skb, at + sizeof frame, &inner, 0);
	else
		inner.broken = 1; /* neighbours are written down by hand here; nobody asks for them through the tunnel */
	if (inner.broken)
		return refused(skb, s, outer, VXLAN_MALFORMED);
	place = place_of(&inner.from);
	/* A node speaks to pods with its own address as well: answers of its host network, ICMP errors. */
	if (!same(&inner.from, &outer->from) && (!place || place->kind != PEER || !same(&place->node, &outer->from)))
		return refused(skb, s, outer, VXLAN_WRONG_SOURCE);
	count(CHECKED, 1);
	return NEXT;
}

always_inline int check(struct __sk_buff *skb, const struct settings *s, const __u32 l2)
{
	struct {
		struct udphdr udp;
		__u8 flags, reserved[3];
		__be32 vni;
	} head;
	const struct place *place;
	struct ip ip = {};
	__u32 i;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		read4(skb, l2, &ip);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		read6(skb, l2, &ip, s->count > 0);
	else
		return NEXT;
	if (ip.broken)
		return dropped(PLAIN_MALFORMED);
	place = place_of(&ip.from);
	if (place && place->kind != PEER)
		return dropped(place->kind == OWN ? PLAIN_OWN_SOURCE : PLAIN_UNKNOWN_SOURCE);
	if (place)
		count(CHECKED, 1);
	if (!s->count || ip.protocol != IPPROTO_UDP || ip.later || bpf_skb_load_bytes(skb, ip.next, &head.udp, sizeof head.udp))
		return NEXT;
	for (i = 0; i < TUNNELS && i < s->count; i++) {
		if (head.udp.dest != s->tunnels[i].port)
			continue;
		if (bpf_skb_load_bytes(skb, ip.next, &head, sizeof head))
			return refused(skb, s, &ip, VXLAN_MALFORMED);
		if (head.flags & VXLAN_HAS_VNI && (head.vni & bpf_htonl(0xffffff00)) == s->tunnels[i].vni)
			return look_inside(skb, s, &ip, ip.next + sizeof head.udp);
	}
	return NEXT;
}

SEC("tc")
int np_guard(struct __sk_buff *skb)
{
	const __u32 only = 0;
	const struct settings *s = bpf_map_lookup_elem(&settings, &only);

	if (!s || skb->vlan_present)
		return NEXT;
	return s->header ? check(skb, s, ETH_HLEN) : check(skb, s, 0);
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
