/* Services at the socket: who connects to one, or sends it a datagram, speaks to an endpoint from the first packet on.
 *
 *     connect(10.96.0.1:80) --> which service? --> which endpoint? --> the socket connects to 10.244.2.7:8080
 *     getpeername()         <-- 10.96.0.1:80   (peers)
 *
 *     sendto(10.96.0.10:53) --> the same, for each datagram; a socket keeps its endpoint as long as that is one
 *     recvfrom()            <-- from 10.96.0.10:53   (peers)
 *
 * No packet is touched, no connection tracked. What is not decided here goes on to the node's packet rules as if we were not there:
 * connected UDP (the rules notice when an endpoint goes, a connected socket would not), sockets of the node that are bound to an
 * address (rules may replace it), and services that are not for whoever asks. A frontend that nobody serves refuses at once.
 *
 * Source: net/ipv4/af_inet.c, net/ipv4/udp.c and net/core/filter.c (sock_addr_func_proto); the layout is in np_services.h. */
#include <linux/errno.h>

#include "services.h"

enum counter {
	TRANSLATED,
	REFUSED,
	LEFT,
	COUNTERS,
};

#include "counters.h"

#define REMEMBERED 32768
#define ALLOWED 1
#define DENIED 0

enum answer {
	NOT_OURS,
	GOES,
	REFUSE,
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct np_settings);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, REMEMBERED);
	__type(key, struct np_client);
	__type(value, struct np_choice);
} clients SEC(".maps");

/* Apart, so that many short connections do not push out whom a datagram's answer has to be from. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, REMEMBERED);
	__type(key, struct np_talk);
	__type(value, struct np_end);
} tcp_peers SEC(".maps"), udp_peers SEC(".maps");

always_inline struct np_end end4(const struct bpf_sock_addr *ctx)
{
	return (struct np_end){{0, 0, bpf_htonl(0xffff), ctx->user_ip4}, ctx->user_port, ctx->protocol, 0};
}

always_inline struct np_end end6(const struct bpf_sock_addr *ctx)
{
	return (struct np_end){{ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]}, ctx->user_port, ctx->protocol, 0};
}

/* Which fields there are depends on the hook; `v6` is a constant wherever this is used. */
always_inline void write(struct bpf_sock_addr *ctx, const struct np_end *end, const int v6)
{
	if (v6) {
		ctx->user_ip6[0] = end->address[0];
		ctx->user_ip6[1] = end->address[1];
		ctx->user_ip6[2] = end->address[2];
		ctx->user_ip6[3] = end->address[3];
	} else {
		ctx->user_ip4 = end->address[3];
	}
	ctx->user_port = end->port;
}

/* The endpoint that the client had before, if it still is one, else one by lot. `client` 0: nobody remembers. */
always_inline int choose(const struct np_service *service, __u64 client, struct np_end *end)
{
	struct np_client key = {client, service->id};
	struct np_choice choice = {}, *before;

	if (!client)
		return draw(service, end);
	choice.since = bpf_ktime_get_ns();
	before = bpf_map_lookup_elem(&clients, &key);
	if (before && (!service->affinity || choice.since - before->since < service->affinity * NANOSECONDS)) {
		*end = before->end;
		if (is_member(service->id, end)) {
			before->since = choice.since;
			return 1;
		}
	}
	if (!draw(service, end))
		return 0;
	choice.end = *end;
	bpf_map_update_elem(&clients, &key, &choice, BPF_ANY);
	return 1;
}

/* What becomes of a socket's wish to speak to `to`; with GOES, whom it shall speak to is in `end`. */
always_inline enum answer ask(struct bpf_sock_addr *ctx, const struct np_end *to, struct np_end *end, int is_bound)
{
	const __u64 space = bpf_get_netns_cookie(ctx), socket = bpf_get_socket_cookie(ctx);
	const __u32 only = 0;
	const struct np_settings *own_settings = bpf_map_lookup_elem(&settings, &only);
	const struct np_service *service;
	__u32 who;

	if (!own_settings)
		return NOT_OURS;
	who = space == own_settings->node ? NP_NODE : NP_PODS;
	service = service_of(to, who);
	if (!service)
		return NOT_OURS;
	if (!(service->who & who) || (who == NP_NODE && is_bound)) {
		count(LEFT, 1);
		return NOT_OURS;
	}
	if (!service->count) {
		if (!(service->how & NP_REFUSES))
			return NOT_OURS;
		count(REFUSED, 1);
		return REFUSE;
	}
	if (!choose(service, service->affinity ? space : to->protocol == IPPROTO_UDP ? socket : 0, end))
		return NOT_OURS;
	count(TRANSLATED, 1);
	return GOES;
}

always_inline const struct np_end *asked_by(struct bpf_sock_addr *ctx, void *peers, const struct np_end *end)
{
	struct np_talk key = {.socket = bpf_get_socket_cookie(ctx), .end = *end};

	return bpf_map_lookup_elem(peers, &key);
}

always_inline void remember(struct bpf_sock_addr *ctx, void *peers, const struct np_end *end, const struct np_end *asked)
{
	struct np_talk key = {.socket = bpf_get_socket_cookie(ctx), .end = *end};
	const struct np_end *known = bpf_map_lookup_elem(peers, &key);

	if (!known || known->port != asked->port || !same((const void *)known->address, (const void *)asked->address))
		bpf_map_update_elem(peers, &key, asked, BPF_ANY);
}

/* On the way out: the endpoint in the place of the service. */
always_inline int out(struct bpf_sock_addr *ctx, void *peers, const struct np_end *to, int is_bound, const int v6)
{
	struct np_end end = {};

	switch (ask(ctx, to, &end, is_bound)) {
	case REFUSE:
		bpf_set_retval(-ECONNREFUSED);
		return DENIED;
	case GOES:
		remember(ctx, peers, &end, to);
		write(ctx, &end, v6);
		return ALLOWED;
	case NOT_OURS:
		return ALLOWED;
	}
	return ALLOWED;
}

/* On the way back: the service in the place of the endpoint. Settings are looked at so that each program has them: they tell the
 * agent whose programs these are. */
always_inline int back(struct bpf_sock_addr *ctx, void *peers, const struct np_end *end, const int v6)
{
	const __u32 only = 0;
	const struct np_end *asked;

	if (!bpf_map_lookup_elem(&settings, &only))
		return ALLOWED;
	asked = asked_by(ctx, peers, end);
	if (asked)
		write(ctx, asked, v6);
	return ALLOWED;
}

always_inline int is_bound4(const struct bpf_sock_addr *ctx)
{
	const struct bpf_sock *sk = ctx->sk;

	return sk && sk->src_ip4;
}

always_inline int is_bound6(const struct bpf_sock_addr *ctx)
{
	const struct bpf_sock *sk = ctx->sk;

	return sk && (sk->src_ip6[0] || sk->src_ip6[1] || sk->src_ip6[2] || sk->src_ip6[3]);
}

SEC("cgroup/connect4")
int np_connect4(struct bpf_sock_addr *ctx)
{
	const struct np_end to = end4(ctx);

	return to.protocol == IPPROTO_TCP ? out(ctx, &tcp_peers, &to, is_bound4(ctx), 0) : ALLOWED;
}

SEC("cgroup/connect6")
int np_connect6(struct bpf_sock_addr *ctx)
{
	const struct np_end to = end6(ctx);

	return to.protocol == IPPROTO_TCP ? out(ctx, &tcp_peers, &to, is_bound6(ctx), 1) : ALLOWED;
}

SEC("cgroup/sendmsg4")
int np_sendmsg4(struct bpf_sock_addr *ctx)
{
	const struct np_end to = end4(ctx);

	return out(ctx, &udp_peers, &to, is_bound4(ctx) || ctx->msg_src_ip4, 0);
}

SEC("cgroup/sendmsg6")
int np_sendmsg6(struct bpf_sock_addr *ctx)
{
	const struct np_end to = end6(ctx);
	const int states = ctx->msg_src_ip6[0] || ctx->msg_src_ip6[1] || ctx->msg_src_ip6[2] || ctx->msg_src_ip6[3];

	return out(ctx, &udp_peers, &to, states || is_bound6(ctx), 1);
}

SEC("cgroup/recvmsg4")
int np_recvmsg4(struct bpf_sock_addr *ctx)
{
	const struct np_end end = end4(ctx);

	return back(ctx, &udp_peers, &end, 0);
}

SEC("cgroup/recvmsg6")
int np_recvmsg6(struct bpf_sock_addr *ctx)
{
	const struct np_end end = end6(ctx);

	return back(ctx, &udp_peers, &end, 1);
}

SEC("cgroup/getpeername4")
int np_getpeername4(struct bpf_sock_addr *ctx)
{
	const struct np_end end = end4(ctx);

	return end.protocol == IPPROTO_TCP ? back(ctx, &tcp_peers, &end, 0) : ALLOWED;
}

SEC("cgroup/getpeername6")
int np_getpeername6(struct bpf_sock_addr *ctx)
{
	const struct np_end end = end6(ctx);

	return end.protocol == IPPROTO_TCP ? back(ctx, &tcp_peers, &end, 1) : ALLOWED;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
