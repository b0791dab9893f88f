/* The kernel's connections: what the programs read of them, wherever it lies in the running kernel, ask of them, and begin.
 *
 * Source: net/netfilter/nf_conntrack_bpf.c, nf_nat_bpf.c, nf_conntrack_proto_tcp.c; include/uapi/linux/netfilter. */
#ifndef NODEPLANE_BPF_TRACKING_H
#define NODEPLANE_BPF_TRACKING_H

#include "wire.h"

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

/* A connection that is not in the table yet. */
struct nf_conn___init {
	int unused;
};

enum nf_nat_manip_type {
	NF_NAT_MANIP_SRC,
	NF_NAT_MANIP_DST,
};

extern struct nf_conn *bpf_skb_ct_lookup(struct __sk_buff *skb, struct bpf_sock_tuple *tuple, __u32 size, struct bpf_ct_opts *opts,
					 __u32 opts_size) __ksym;
extern void bpf_ct_release(struct nf_conn *conn) __ksym;
extern struct nf_conn___init *bpf_skb_ct_alloc(struct __sk_buff *skb, struct bpf_sock_tuple *tuple, __u32 size,
					       struct bpf_ct_opts *opts, __u32 opts_size) __ksym;
extern int bpf_ct_set_nat_info(struct nf_conn___init *conn, union nf_inet_addr *to, int port, enum nf_nat_manip_type kind) __ksym;
extern void bpf_ct_set_timeout(struct nf_conn___init *conn, __u32 milliseconds) __ksym;
extern struct nf_conn *bpf_ct_insert_entry(struct nf_conn___init *conn) __ksym;
extern int bpf_ct_change_timeout(struct nf_conn *conn, __u32 milliseconds) __ksym;

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
#define TCP_NONE 0
#define TCP_ESTABLISHED 3

#endif
