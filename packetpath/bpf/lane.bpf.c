/* The short lane: packets go from a pod's link, or the uplink, straight to the next one.
 *
 *     pod a  eth0 --veth-- ingress: np_lane --- known way, not older than a second ---> pod b's eth0, or the uplink's queue
 *                              |---- opens a connection to a Service, or to a pod of this node: entered, then the same
 *                              |
 *                              '-- anything else --> the kernel's own way: rules, connection tracking, routes
 *
 * An open connection. What may take the lane is not decided here. The kernel's connection tracking is asked: a connection that rules have
 * let through in both directions, that is assured, and nowhere near its end. Where it goes is asked of the kernel's routes, in both
 * directions. What was found is remembered as a way for a second; the packet that asked goes the long way, so that tracking sees one
 * a second and does not let go of the connection. A new generation, which the agent begins when it has cut connections, or links have
 * changed, ends all ways at once.
 *
 * A new one. A pod that asks for a Service all of whose endpoints are pods gets one of them, here, by the tables that sockets ask
 * (services.h). The connection is entered in the kernel's tracking, with its translation, before its first packet goes anywhere; so
 * whatever comes afterwards, an error, a fragment, a second SYN, finds it there and is the kernel's. If both ends are free of policies and
 * the endpoint is on this node the packet takes the lane, and so does the answer to a SYN, for tracking has not seen what it answers;
 * else it goes the long way, and rules judge it. A connection straight to a pod of this node begins likewise, if both are free.
 *
 * The long way go: all that ends a connection, fragments, IP options and extension headers, what is longer than the next link
 * takes, what is at its last hop, ICMP, what asks for a Service that the tables leave to rules.
 *
 * Tracking misses what goes here, and has to put up with sequence numbers it did not see (net.netfilter.nf_conntrack_tcp_be_liberal).
 *
 * Source: net/netfilter/nf_conntrack_bpf.c, nf_conntrack_core.c, net/core/filter.c (bpf_ipv4_fib_lookup, __bpf_redirect_peer). */
#include "packet.h"
#include "services.h"
#include "tracking.h"

enum counter {
	TAKEN,   /* packets that went this way */
	LEARNED, /* ways that were found */
	LEFT,    /* packets of which no way could be found */
	OPENED,  /* connections that began here */
	LED,     /* connections to which an endpoint was given here, and that began the long way */
	COUNTERS,
};

#include "counters.h"

#define SECOND 1000000000ULL
#define WAYS 65536
#define LEAST_SECONDS 4 /* what a connection must have left */
#define VISITORS 32768
/* Until an answer, in milliseconds; as tracking has it for SYN_RECV and for UDP. */
#define OPENING 60000
#define UNANSWERED 30000

enum kind {
	POD = 1,  /* the node's end of a pod's veth: packets go to its other end */
	EXIT = 2, /* any other link: packets go into its queue */
};

struct settings {
	__u8 build[8];
	__u32 generation;
	__u32 hz; /* of the kernel's clock by which connections time out */
	__be16 tunnel; /* UDP port of the node's VXLAN tunnel: its packets end here, and are passed over; 0: there is none */
	__u8 opens; /* whether connections may begin here */
	__u8 unused;
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

/* Addresses of pods that some policy is about. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct address);
	__type(value, __u32);
} judged SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, WAYS);
	__type(key, struct flow);
	__type(value, struct way);
} ways SEC(".maps");

/* Where a Service has affinity: which endpoint a client had last. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, VISITORS);
	__type(key, struct np_visitor);
	__type(value, struct np_choice);
} visitors SEC(".maps");

/* -- finding a way ----------------------------------------------------------------------------------------------------------- */

always_inline void copy(struct address *to, const union nf_inet_addr *from, int v6)
{
	if (v6)
		*to = (struct address){{from->all[0], from->all[1], from->all[2], from->all[3]}};
	else
		*to = mapped(from->all[0]);
}

always_inline __u32 tuple_of(struct bpf_sock_tuple *tuple, const struct packet *p)
{
	if (p->v6) {
		__builtin_memcpy(tuple->ipv6.saddr, &p->flow.from, 16);
		__builtin_memcpy(tuple->ipv6.daddr, &p->flow.to, 16);
		tuple->ipv6.sport = p->flow.from_port;
		tuple->ipv6.dport = p->flow.to_port;
		return sizeof tuple->ipv6;
	}
	tuple->ipv4.saddr = p->flow.from.word[3];
	tuple->ipv4.daddr = p->flow.to.word[3];
	tuple->ipv4.sport = p->flow.from_port;
	tuple->ipv4.dport = p->flow.to_port;
	return sizeof tuple->ipv4;
}

always_inline struct nf_conn *connection_of(struct __sk_buff *skb, const struct packet *p, struct bpf_ct_opts *opts)
{
	struct bpf_sock_tuple tuple = {};

	tuple_of(&tuple, p);
	if (p->v6)
		return bpf_skb_ct_lookup(skb, &tuple, sizeof tuple.ipv6, opts, sizeof *opts);
	return bpf_skb_ct_lookup(skb, &tuple, sizeof tuple.ipv4, opts, sizeof *opts);
}

/* What the connection makes of a packet in this direction. */
always_inline void translate(const struct nf_conn *conn, int is_reply, struct way *way)
{
	const struct nf_conntrack_tuple *other = is_reply ? &conn->tuplehash[0].tuple : &conn->tuplehash[1].tuple;

	copy(&way->from, &other->dst.u3, way->v6);
	copy(&way->to, &other->src.u3, way->v6);
	way->from_port = other->dst.u.all;
	way->to_port = other->src.u.all;
}

/* Whether a connection is open, and will be for longer than a way holds. */
always_inline int is_open(const struct nf_conn *conn, const struct packet *p, const struct settings *s)
{
	const __s32 left = (__s32)(conn->timeout - (__u32)bpf_jiffies64());

	return (conn->status & WELL_KNOWN) == WELL_KNOWN && !(conn->status & NOT_FOR_US) && left > (__s32)(LEAST_SECONDS * s->hz) &&
	       (p->flow.protocol != IPPROTO_TCP || conn->proto.tcp.state == TCP_ESTABLISHED);
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

/* Whether an answer would come out where the packet came in: else its sender is not who it says. */
always_inline int is_from_here(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_fib_lookup back = {};
	const long found = ask(skb, &back, p, &p->flow.to, &p->flow.from);

	return (found == BPF_FIB_LKUP_RET_SUCCESS || found == BPF_FIB_LKUP_RET_NO_NEIGH) && back.ifindex == skb->ifindex;
}

/* Where the kernel would send the packet. Into a pod no neighbour has to be known: there is only one at the other end. */
always_inline int find_route(struct __sk_buff *skb, const struct packet *p, struct way *way)
{
	struct bpf_fib_lookup there = {};
	const __u32 here = skb->ifindex;
	const __u32 *kind;
	__u32 mtu = 0;
	long found;

	there.sport = way->from_port;
	there.dport = way->to_port;
	found = ask(skb, &there, p, &way->from, &way->to);
	if ((found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH) || there.ifindex == skb->ifindex)
		return 0;
	/* Where a card has summed up a whole packet, replacing IPv6 addresses takes a flag that kernels before 6.16 do not know. */
	kind = bpf_map_lookup_elem(&links, &here);
	if (p->v6 && (!kind || *kind != POD) && (!same(&way->from, &p->flow.from) || !same(&way->to, &p->flow.to)))
		return 0;
	kind = bpf_map_lookup_elem(&links, &there.ifindex);
	if (!kind)
		return 0;
	if (found == BPF_FIB_LKUP_RET_NO_NEIGH) {
		if (*kind != POD || bpf_check_mtu(skb, there.ifindex, &mtu, 0, 0) < 0)
			return 0;
		there.mtu_result = mtu;
	}
	way->link = there.ifindex;
	way->kind = *kind;
	way->mtu = there.mtu_result;
	__builtin_memcpy(way->macs, there.dmac, 6);
	__builtin_memcpy(way->macs + 6, there.smac, 6);
	return 1;
}

/* -- a new connection -------------------------------------------------------------------------------------------------------- */

enum target {
	NO_SERVICE, /* the address that the packet has */
	SERVICE,    /* an endpoint */
	FOR_RULES,
};

always_inline int is_judged(const struct address *address)
{
	return !!bpf_map_lookup_elem(&judged, address);
}

/* One of the service's endpoints; where it has affinity, the one that this client had before. */
always_inline int choose(const struct np_service *service, const struct address *client, struct np_end *end)
{
	struct np_visitor key = {.id = service->id};
	struct np_choice choice = {}, *before;

	if (!service->affinity)
		return draw(service, end);
	__builtin_memcpy(key.address, client, sizeof key.address);
	choice.since = bpf_ktime_get_ns();
	before = bpf_map_lookup_elem(&visitors, &key);
	if (before && choice.since - before->since < service->affinity * NANOSECONDS) {
		*end = before->end;
		if (is_member(service->id, end)) {
			before->since = choice.since;
			return 1;
		}
	}
	if (!draw(service, end))
		return 0;
	choice.end = *end;
	bpf_map_update_elem(&visitors, &key, &choice, BPF_ANY);
	return 1;
}

/* Whom a pod's packet is for. */
always_inline enum target seek(const struct packet *p, struct way *way)
{
	struct np_end end = {.port = p->flow.to_port, .protocol = p->flow.protocol};
	const struct np_service *service;

	way->from = p->flow.from;
	way->from_port = p->flow.from_port;
	way->to = p->flow.to;
	way->to_port = p->flow.to_port;
	__builtin_memcpy(end.address, &p->flow.to, sizeof end.address);
	service = service_of(&end, NP_PODS);
	if (!service)
		return NO_SERVICE;
	if (!(service->who & NP_PODS) || !(service->how & NP_PODS_ONLY) || !service->count || !choose(service, &p->flow.from, &end))
		return FOR_RULES;
	__builtin_memcpy(&way->to, end.address, sizeof way->to);
	way->to_port = end.port;
	return same(&way->to, &way->from) ? FOR_RULES : SERVICE; /* to itself it needs another source */
}

/* Enter the connection with its translation; 0 if there is one already, or no room. */
always_inline int enter(struct __sk_buff *skb, const struct packet *p, const struct way *way, const int is_translated)
{
	struct bpf_ct_opts opts = {.netns_id = -1, .l4proto = p->flow.protocol};
	struct bpf_sock_tuple tuple = {};
	struct nf_conn___init *entry;
	union nf_inet_addr to = {};
	struct nf_conn *conn;

	tuple_of(&tuple, p);
	if (p->v6) {
		__builtin_memcpy(&to, &way->to, sizeof to);
		entry = bpf_skb_ct_alloc(skb, &tuple, sizeof tuple.ipv6, &opts, sizeof opts);
	} else {
		to.all[0] = way->to.word[3];
		entry = bpf_skb_ct_alloc(skb, &tuple, sizeof tuple.ipv4, &opts, sizeof opts);
	}
	if (!entry)
		return 0;
	bpf_ct_set_timeout(entry, p->flow.protocol == IPPROTO_TCP ? OPENING : UNANSWERED);
	/* What it refuses is a destination that another connection has; then the kernel takes no entry either. */
	if (is_translated)
		bpf_ct_set_nat_info(entry, &to, bpf_ntohs(way->to_port), NF_NAT_MANIP_DST);
	conn = bpf_ct_insert_entry(entry);
	if (!conn)
		return 0;
	bpf_ct_release(conn);
	return 1;
}

/* The first packet of a connection; whether it takes the lane, on `way`. */
always_inline int begin(struct __sk_buff *skb, const struct packet *p, const struct settings *s, struct way *way)
{
	const __u32 here = skb->ifindex, *kind = bpf_map_lookup_elem(&links, &here);
	enum target target;
	int is_near;

	if (!s->opens || !kind || *kind != POD)
		return 0;
	target = seek(p, way);
	if (target == FOR_RULES || !is_from_here(skb, p))
		return 0;
	is_near = find_route(skb, p, way) && way->kind == POD && is_short(skb, p, way) && !is_judged(&way->from) && !is_judged(&way->to);
	if ((target == NO_SERVICE && !is_near) || !enter(skb, p, way, target == SERVICE))
		return 0;
	count(is_near ? OPENED : LED, 1);
	return is_near;
}

/* The answer to a SYN that tracking has not seen, or what takes it back; whether it takes the lane, on `way`. */
always_inline int answer(struct __sk_buff *skb, const struct packet *p, struct way *way)
{
	struct bpf_ct_opts opts = {.netns_id = -1, .l4proto = p->flow.protocol};
	struct nf_conn *conn = connection_of(skb, p, &opts);
	int is_ours;

	if (!conn)
		return 0;
	is_ours = (conn->status & (CONFIRMED | SEEN_REPLY | NOT_FOR_US)) == CONFIRMED && conn->proto.tcp.state == TCP_NONE &&
		  (opts.dir || p->stage == REFUSES);
	if (is_ours)
		translate(conn, opts.dir, way);
	if (is_ours && p->stage == REFUSES)
		bpf_ct_change_timeout(conn, 0);
	bpf_ct_release(conn);
	return is_ours && is_from_here(skb, p) && find_route(skb, p, way) && is_short(skb, p, way);
}

/* -- an open connection ------------------------------------------------------------------------------------------------------ */

/* Ask tracking and routes, for the packets that follow. This one takes the lane only if it begins a connection, on `way`. */
always_inline int learn(struct __sk_buff *skb, const struct packet *p, const struct settings *s, struct way *way)
{
	struct bpf_ct_opts opts = {.netns_id = -1, .l4proto = p->flow.protocol};
	struct nf_conn *conn = connection_of(skb, p, &opts);
	int fits;

	if (!conn)
		return p->flow.protocol == IPPROTO_UDP && begin(skb, p, s, way);
	fits = is_open(conn, p, s);
	if (fits)
		translate(conn, opts.dir, way);
	bpf_ct_release(conn);
	if (fits && is_from_here(skb, p) && find_route(skb, p, way)) {
		way->until = bpf_ktime_get_ns() + SECOND;
		bpf_map_update_elem(&ways, &p->flow, way, BPF_ANY);
		count(LEARNED, 1);
	} else {
		count(LEFT, 1);
	}
	return 0;
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

/* -- the program ----------------------------------------------------------------------------------------------------------- */

/* The packet, translated, on to the next link. */
always_inline int go(struct __sk_buff *skb, const struct packet *p, const struct way *way)
{
	if (replace(skb, p, &p->flow.to, &way->to, p->flow.to_port, way->to_port, 0) ||
	    replace(skb, p, &p->flow.from, &way->from, p->flow.from_port, way->from_port, 1) || step(skb, p))
		return TC_ACT_SHOT; /* half changed; no helper fails on what has been read */
	count(TAKEN, 1);
	if (way->kind == POD)
		return bpf_redirect_peer(way->link, 0);
	if (bpf_skb_store_bytes(skb, 0, way->macs, sizeof way->macs, 0))
		return TC_ACT_SHOT;
	return bpf_redirect(way->link, 0);
}

SEC("tc")
int np_lane(struct __sk_buff *skb)
{
	const __u32 only = 0;
	const struct settings *s = bpf_map_lookup_elem(&settings, &only);
	struct packet p = {};
	struct way fresh = {};
	const struct way *way;

	if (!s || skb->vlan_present || skb->pkt_type != 0 || !read(skb, &p)) /* 0: to this host's address of the link (PACKET_HOST) */
		return NEXT;
	if (p.flow.protocol == IPPROTO_UDP && p.flow.to_port == s->tunnel)
		return NEXT;
	fresh.v6 = p.v6;
	fresh.generation = s->generation;
	if (p.stage == OPENS) {
		way = begin(skb, &p, s, &fresh) ? &fresh : 0;
	} else if (p.stage == AGREES) {
		way = answer(skb, &p, &fresh) ? &fresh : 0;
	} else {
		way = bpf_map_lookup_elem(&ways, &p.flow);
		if (p.stage != BETWEEN) {
			if (way)
				return forget(&p.flow, way);
			way = p.stage == REFUSES && answer(skb, &p, &fresh) ? &fresh : 0;
		} else if (!way || way->generation != s->generation || way->until < bpf_ktime_get_ns()) {
			way = learn(skb, &p, s, &fresh) ? &fresh : 0;
		} else if (!is_short(skb, &p, way)) {
			way = 0;
		}
	}
	return way ? go(skb, &p, way) : NEXT;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
