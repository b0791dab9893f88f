/* What the programs know of packets: addresses of both families as one kind, the headers, and sums of 16-bit words.
 *
 * An address is 16 bytes; IPv4 lies in the last four as ::ffff:a.b.c.d, so one table holds both. Numbers of the wire stay in the
 * wire's byte order until somebody counts with them. Source: RFC 791, 8200, 768, 1071, 1624, 4291 section 2.5.5.2. */
#ifndef NODEPLANE_BPF_WIRE_H
#define NODEPLANE_BPF_WIRE_H

#include <stddef.h>

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define NEXT TC_ACT_UNSPEC /* not ours: whoever is attached behind us, then the kernel, goes on with it */
#define IP_FRAGMENT 0x3fff /* more fragments, or an offset */
#define IP_OFFSET 0x1fff
#define MAX_L4 1500 /* bytes that checksum.h is ready to add up */

#define always_inline static __attribute__((always_inline)) inline

struct address {
	__u32 word[4];
};

always_inline struct address mapped(__u32 ip)
{
	return (struct address){{0, 0, bpf_htonl(0xffff), ip}};
}

always_inline struct address of6(const struct in6_addr *ip)
{
	return (struct address){{ip->s6_addr32[0], ip->s6_addr32[1], ip->s6_addr32[2], ip->s6_addr32[3]}};
}

always_inline int same(const struct address *a, const struct address *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] && a->word[3] == b->word[3];
}

always_inline __u16 folded(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* Where the packet starts and ends. As assembly, because clang would keep a copy of the 32-bit value that the verifier does not
 * take for a pointer any more. */
always_inline void *data_of(const struct __sk_buff *skb)
{
	void *data;

	asm volatile("%0 = *(u32 *)(%1 + %2)" : "=r"(data) : "r"(skb), "i"(offsetof(struct __sk_buff, data)));
	return data;
}

always_inline void *end_of(const struct __sk_buff *skb)
{
	void *end;

	asm volatile("%0 = *(u32 *)(%1 + %2)" : "=r"(end) : "r"(skb), "i"(offsetof(struct __sk_buff, data_end)));
	return end;
}

/* The packet's start, if its first `bytes` are there and can be read in place. */
always_inline void *reach(struct __sk_buff *skb, __u32 bytes)
{
	void *data = data_of(skb);

	if (data + bytes <= end_of(skb))
		return data;
	if (bpf_skb_pull_data(skb, bytes))
		return 0;
	data = data_of(skb);
	return data + bytes <= end_of(skb) ? data : 0;
}

/* How many packets of the wire this one becomes. */
always_inline __u32 segments(const struct __sk_buff *skb, __u32 payload)
{
	__u32 size = skb->gso_size;

	return size && payload > size ? (payload + size - 1) / size : 1;
}

#endif
