/* Where pods are: the longest prefix that holds an address tells whose it is, and each node is known by its outer address.
 *
 *     places   10.244.0.0/16 -> the pod network          nodes   192.168.1.2 -> when it was last heard
 *              10.244.1.0/24 -> our own
 *              10.244.2.0/24 -> behind 192.168.1.2
 *
 * One table serves both directions: where to send a packet, and whether who sent one may have its source. */
#ifndef NODEPLANE_BPF_PLACES_H
#define NODEPLANE_BPF_PLACES_H

#include "wire.h"

enum kind { PEER = 1, OWN = 2, NETWORK = 3 };

struct prefix {
	__u32 length; /* IPv4: 96 more than one says */
	struct address address;
};

struct place {
	struct address node; /* kind PEER: its outer address */
	__u32 kind;
};

struct node {
	__u64 heard, whole; /* nanoseconds; unwrap.h, `learn` */
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 17);
	__type(key, struct prefix);
	__type(value, struct place);
} places SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 17);
	__type(key, struct address);
	__type(value, struct node);
} nodes SEC(".maps");

always_inline struct place *place_of(const struct address *address)
{
	struct prefix key = {128, *address};

	return bpf_map_lookup_elem(&places, &key);
}

#endif
