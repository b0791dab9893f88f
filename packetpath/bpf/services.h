/* The tables of Services, and how they are asked: the same for a socket that connects and for a packet that arrives.
 *
 *     address, port, protocol --> service_of --> draw --> an endpoint
 *
 * The layout, and who writes it in which order, is in np_services.h. */
#ifndef NODEPLANE_BPF_SERVICES_H
#define NODEPLANE_BPF_SERVICES_H

#include "wire.h"

#include "../include/np_services.h"

#define NANOSECONDS 1000000000ULL

/* Not preallocated: an element that was replaced stays readable until no program reads it any more. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 14);
	__type(key, struct np_end);
	__type(value, struct np_service);
} frontends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 12);
	__type(key, struct address);
	__type(value, __u32);
} own SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << 14);
	__type(key, __u32);
	__type(value, struct np_end);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 14);
	__type(key, struct np_member);
	__type(value, __u32);
} members SEC(".maps");

/* IPv4 addresses lie in IPv6 sockets as they lie in the tables. */
always_inline int is_ipv4(const struct np_end *end)
{
	return !end->address[0] && !end->address[1] && end->address[2] == bpf_htonl(0xffff);
}

/* The service at an address, else at a NodePort if the address is one where these answer to `who`. */
always_inline const struct np_service *service_of(const struct np_end *to, __u32 who)
{
	const struct np_service *found = bpf_map_lookup_elem(&frontends, to);
	struct np_end node_port = *to;
	const __u32 *allowed;

	if (found)
		return found;
	if (is_ipv4(to) && (to->address[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000))
		node_port.address[3] = bpf_htonl(0x7f000001); /* all of 127.0.0.0/8 is loopback */
	allowed = bpf_map_lookup_elem(&own, node_port.address);
	if (!allowed || !(*allowed & who))
		return 0;
	if (!is_ipv4(to))
		node_port.address[0] = node_port.address[1] = node_port.address[2] = 0;
	node_port.address[3] = 0;
	return bpf_map_lookup_elem(&frontends, &node_port);
}

always_inline int is_member(__u64 id, const struct np_end *end)
{
	struct np_member member = {.id = id, .end = *end};

	return !!bpf_map_lookup_elem(&members, &member);
}

always_inline int draw(const struct np_service *service, struct np_end *end)
{
	const __u32 slot = service->first + bpf_get_prandom_u32() % service->count;
	const struct np_end *found = bpf_map_lookup_elem(&slots, &slot);

	if (!found || !found->port)
		return 0;
	*end = *found;
	return 1;
}

#endif
