/* What both directions of the UDP tunnel share: counters, settings, and what decides about a packet. */
#ifndef NODEPLANE_BPF_UDP_H
#define NODEPLANE_BPF_UDP_H

#include "places.h"

enum counter {
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

#endif
