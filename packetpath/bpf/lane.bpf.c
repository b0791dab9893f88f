/* The short lane: a packet of a connection that is well known goes from a pod's link, or the uplink, straight to the next one.
 *
 *     pod a  eth0 --veth-- ingress: np_lane --- known way, not older than a second ---> pod b's eth0, or the uplink's queue
 *                              |
 *                              '-- anything else --> the kernel's own way: rules, connection tracking, routes
 *
 * What may take it is not decided here. The kernel's connection tracking is asked: a connection that rules have let through in both
 * directions, that is assured, and nowhere near its end. Where it goes is asked of the kernel's routes, in both directions. What was
 * found is remembered as a way for a second; the packet that asked goes the long way, so that tracking sees one a second and
 * does not let go of the connection. A new generation, which the agent begins when it has cut connections, or links have changed,
 * ends all ways at once.
 *
 * The long way go: all that opens or ends a connection, fragments, IP options and extension headers, what is longer than the
 * next link takes, what is at its last hop, ICMP, and everything while a connection is being set up. So rules, policies, NAT
 * and errors are the kernel's in every case; a way only repeats what the kernel did with the packet before.
 *
 * Tracking misses what goes here, and has to put up with sequence numbers it did not see (net.netfilter.nf_conntrack_tcp_be_liberal).
 *
 * Source: net/netfilter/nf_conntrack_bpf.c, nf_conntrack_core.c, net/core/filter.c (bpf_ipv4_fib_lookup, __bpf_redirect_peer). */
#include "wire.h"

enum counter {
	TAKEN,   /* packets that went this way */
	LEARNED, /* ways that were found */
	LEFT,    /* packets of which no way could be found */
	COUNTERS,
};

#include "counters.h"

#define SECOND 1000000000ULL
#define WAYS 65536
#define LEAST_SECONDS 4 /* what a connection must have left */

enum kind {
	POD = 1,  /* the node's end of a pod's veth: packets go to its other end */
	EXIT = 2, /* any other link: packets go into its queue */
};

struct settings {
	__u8 build[8];
	__u32 generation;
	__u32 hz; /* of the kernel's clock by which connections time out */
	__be16 tunnel; /* UDP port of the node's VXLAN tunnel: its packets end here, and are passed over; 0: there is none */
	__u16 unused;
};

struct flow {
	struct address from, to;
	__be16 from_port, to_port;
	__u32 link; /* where it came in */
	__u8 protocol, unused[3];
};

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

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u32);
} links SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, WAYS);
	__type(key, struct flow);
	__type(value, struct way);
} ways SEC(".maps");

/* -- the kernel's connections: only what is read of them, wherever it lies in the running kernel ------------------------------- */

#define __ksym __attribute__((section(".ksyms")))
#define followed __attribute__((preserve_access_index))

union nf_inet_addr {
	__u32 all[4];
} followed;

union nf_conntrack_man_proto {
	__be16 all;
} followed;

struct nf_conntrack_man {
	union nf_inet_addr u3;
	union nf_conntrack_man_proto u;
	__u16 l3num;
} followed;

struct nf_conntrack_tuple {
	struct nf_conntrack_man src;
	struct {
		union nf_inet_addr u3;
		union {
			__be16 all;
		} u;
		__u8 protonum;
	} dst;
} followed;

struct nf_conntrack_tuple_hash {
	struct nf_conntrack_tuple tuple;
} followed;

struct ip_ct_tcp {
	__u8 state;
} followed;

union nf_conntrack_proto {
	struct ip_ct_tcp tcp;
} followed;

struct nf_conn {
	__u32 timeout;
	struct nf_conntrack_tuple_hash tuplehash[2];
	unsigned long status;
	union nf_conntrack_proto proto;
} followed;

struct bpf_ct_opts {
	__s32 netns_id;
	__s32 error;
	__u8 l4proto;
	__u8 dir;
	__u8 reserved[2];
};

extern struct nf_conn *bpf_skb_ct_lookup(struct __sk_buff *skb, struct bpf_sock_tuple *tuple, __u32 size, struct bpf_ct_opts *opts,
					 __u32 opts_size) __ksym;
extern void bpf_ct_release(struct nf_conn *conn) __ksym;

/* enum ip_conntrack_status and enum tcp_conntrack are uapi, and do not change. */
#define SEEN_REPLY (1 << 1)
#define ASSURED (1 << 2)
#define CONFIRMED (1 << 3)
#define SEQ_ADJUST (1 << 6)
#define DYING (1 << 9)
#define TEMPLATE (1 << 11)
#define HELPER (1 << 13)
#define WELL_KNOWN (SEEN_REPLY | ASSURED | CONFIRMED)
#define NOT_FOR_US (SEQ_ADJUST | DYING | TEMPLATE | HELPER)
#define TCP_ESTABLISHED 3

/* -- packets ----------------------------------------------------------------------------------------------------------------- */

struct packet {
	struct flow flow;
	__u32 l4;  /* where the next header begins */
	__u32 l3_bytes;
	__u8 v6, ends, tos;
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
	p->ends = tcp->fin || tcp->rst;
	return !tcp->syn;
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

/* -- finding a way ----------------------------------------------------------------------------------------------------------- */

always_inline void copy(struct address *to, const union nf_inet_addr *from, int v6)
{
	if (v6)
		*to = (struct address){{from->all[0], from->all[1], from->all[2], from->all[3]}};
	else
		*to = mapped(from->all[0]);
}

/* What a connection makes of the packet, if it is one that may go here. */
always_inline int translate(struct __sk_buff *skb, const struct packet *p, const struct settings *s, struct way *way)
{
	struct bpf_ct_opts opts = {.netns_id = -1, .l4proto = p->flow.protocol};
	struct bpf_sock_tuple tuple = {};
	const struct nf_conntrack_tuple *other;
	struct nf_conn *conn;
	__s32 left;
	int fits;

	if (p->v6) {
		__builtin_memcpy(tuple.ipv6.saddr, &p->flow.from, 16);
		__builtin_memcpy(tuple.ipv6.daddr, &p->flow.to, 16);
		tuple.ipv6.sport = p->flow.from_port;
		tuple.ipv6.dport = p->flow.to_port;
		conn = bpf_skb_ct_lookup(skb, &tuple, sizeof tuple.ipv6, &opts, sizeof opts);
	} else {
		tuple.ipv4.saddr = p->flow.from.word[3];
		tuple.ipv4.daddr = p->flow.to.word[3];
		tuple.ipv4.sport = p->flow.from_port;
		tuple.ipv4.dport = p->flow.to_port;
		conn = bpf_skb_ct_lookup(skb, &tuple, sizeof tuple.ipv4, &opts, sizeof opts);
	}
	if (!conn)
		return 0;
	left = (__s32)(conn->timeout - (__u32)bpf_jiffies64());
	fits = (conn->status & WELL_KNOWN) == WELL_KNOWN && !(conn->status & NOT_FOR_US) &&
	       left > (__s32)(LEAST_SECONDS * s->hz) &&
	       (p->flow.protocol != IPPROTO_TCP || conn->proto.tcp.state == TCP_ESTABLISHED);
	if (fits) {
		other = opts.dir ? &conn->tuplehash[0].tuple : &conn->tuplehash[1].tuple;
		copy(&way->from, &other->dst.u3, p->v6);
		copy(&way->to, &other->src.u3, p->v6);
		way->from_port = other->dst.u.all;
		way->to_port = other->src.u.all;
	}
	bpf_ct_release(conn);
	return fits;
}

always_inline long ask(struct __sk_buff *skb, struct bpf_fib_lookup *route, const struct packet *p, const struct address *from,
		       const struct address *to)
{
	route->l4_protocol = p->flow.protocol;
	route->ifindex = skb->ifindex;
	if (p->v6) {
		route->family = 10; /* AF_INET6 */
		__builtin_memcpy(route->ipv6_src, from, sizeof *from);
		__builtin_memcpy(route->ipv6_dst, to, sizeof *to);
	} else {
		route->family = 2; /* AF_INET */
		route->tos = p->tos;
		route->ipv4_src = from->word[3];
		route->ipv4_dst = to->word[3];
	}
	return bpf_fib_lookup(skb, route, sizeof *route, 0);
}

/* Where the kernel would send the packet, and whether an answer would come out where it came in. */
always_inline int find_route(struct __sk_buff *skb, const struct packet *p, struct way *way)
{
	struct bpf_fib_lookup there = {}, back = {};
	const __u32 here = skb->ifindex;
	const __u32 *kind;
	long found;

	there.sport = way->from_port;
	there.dport = way->to_port;
	if (ask(skb, &there, p, &way->from, &way->to) != BPF_FIB_LKUP_RET_SUCCESS || there.ifindex == skb->ifindex)
		return 0;
	found = ask(skb, &back, p, &p->flow.to, &p->flow.from);
	if ((found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH) || back.ifindex != skb->ifindex)
		return 0;
	/* Where a card has summed up a whole packet, replacing IPv6 addresses takes a flag that kernels before 6.16 do not know. */
	kind = bpf_map_lookup_elem(&links, &here);
	if (p->v6 && (!kind || *kind != POD) && (!same(&way->from, &p->flow.from) || !same(&way->to, &p->flow.to)))
		return 0;
	kind = bpf_map_lookup_elem(&links, &there.ifindex);
	if (!kind)
		return 0;
	way->link = there.ifindex;
	way->kind = *kind;
	way->mtu = there.mtu_result;
	__builtin_memcpy(way->macs, there.dmac, 6);
	__builtin_memcpy(way->macs + 6, there.smac, 6);
	return 1;
}

always_inline int learn(struct __sk_buff *skb, const struct packet *p, const struct settings *s)
{
	struct way way = {.generation = s->generation, .v6 = p->v6};

	if (!translate(skb, p, s, &way) || !find_route(skb, p, &way))
		return passed_on(LEFT);
	way.until = bpf_ktime_get_ns() + SECOND;
	bpf_map_update_elem(&ways, &p->flow, &way, BPF_ANY);
	return passed_on(LEARNED);
}

/* The connection ends: its ways with it, there and back. */
always_inline int forget(const struct flow *flow, const struct way *way)
{
	struct flow back = {.from = way->to, .to = way->from, .from_port = way->to_port, .to_port = way->from_port};

	back.link = way->link;
	back.protocol = flow->protocol;
	bpf_map_delete_elem(&ways, &back);
	bpf_map_delete_elem(&ways, flow);
	return NEXT;
}

/* -- taking it ----------------------------------------------------------------------------------------------------------------- */

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

SEC("tc")
int np_lane(struct __sk_buff *skb)
{
	const __u32 only = 0;
	const struct settings *s = bpf_map_lookup_elem(&settings, &only);
	struct packet p = {};
	const struct way *way;

	if (!s || skb->vlan_present || skb->pkt_type != 0 || !read(skb, &p)) /* 0: to this host's address of the link (PACKET_HOST) */
		return NEXT;
	if (p.flow.protocol == IPPROTO_UDP && p.flow.to_port == s->tunnel)
		return NEXT;
	way = bpf_map_lookup_elem(&ways, &p.flow);
	if (p.ends)
		return way ? forget(&p.flow, way) : NEXT;
	if (!way || way->generation != s->generation || way->until < bpf_ktime_get_ns())
		return learn(skb, &p, s);
	if (!is_short(skb, &p, way))
		return NEXT;
	if (replace(skb, &p, &p.flow.to, &way->to, p.flow.to_port, way->to_port, 0) ||
	    replace(skb, &p, &p.flow.from, &way->from, p.flow.from_port, way->from_port, 1) || step(skb, &p))
		return TC_ACT_SHOT; /* half changed; no helper fails on what has been read */
	count(TAKEN, 1);
	if (way->kind == POD)
		return bpf_redirect_peer(way->link, 0);
	if (bpf_skb_store_bytes(skb, 0, way->macs, sizeof way->macs, 0))
		return TC_ACT_SHOT;
	return bpf_redirect(way->link, 0);
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
