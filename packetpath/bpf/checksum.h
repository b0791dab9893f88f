/* Finishing a checksum that was left to the network card, where the card may be none and the receiver a program.
 *
 * A pod's kernel leaves the sum of TCP and UDP payload to the card (CHECKSUM_PARTIAL): the field holds the pseudo-header's sum. A
 * link that is no wire (veth, virtio) hands such a packet on unfinished, which a kernel on the other side knows, and a program
 * that reads the tunnel's UDP socket does not. */
#ifndef NODEPLANE_BPF_CHECKSUM_H
#define NODEPLANE_BPF_CHECKSUM_H

#include "wire.h"

#define CHUNK 256

/* The sum of the pseudo-header, in the wire's byte order. What marks IPv4 in an address, 0xffff, adds nothing to such a sum. */
always_inline __u16 pseudo_sum(const struct address *from, const struct address *to, __u8 protocol, __u32 bytes)
{
	__u64 sum = (__u64)bpf_htonl(bytes) + bpf_htonl(protocol);
	int i;

	for (i = 0; i < 4; i++)
		sum += (__u64)from->word[i] + to->word[i];
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	return folded(sum);
}

/* Whether a checksum field holds no more than the pseudo-header's sum. A finished one does so once in 65,536 packets by chance;
 * finishing it again is then harmless. */
always_inline int is_unfinished(__u16 field, __u16 pseudo)
{
	return field == pseudo || ((field == 0 || field == 0xffff) && (pseudo == 0 || pseudo == 0xffff));
}

/* Write the checksum over `bytes` from `start` on into the field at `field`. */
always_inline int sum_up(struct __sk_buff *skb, __u32 start, __u32 bytes, __u32 field, int udp)
{
	__u32 at = start, left = bytes;
	__s64 sum = 0;
	__u16 check;
	int i;

	if (bytes > MAX_L4)
		return -1;
	for (i = 0; i < (MAX_L4 + CHUNK - 1) / CHUNK && left; i++) {
		__u32 chunk[CHUNK / 4] = {};
		__u32 n = left < CHUNK ? left : CHUNK;

		asm volatile("" : "+r"(n)); /* lest clang leave out the next line, by which the verifier sees that n is 1 to CHUNK */
		n = ((n - 1) & (CHUNK - 1)) + 1;
		if (bpf_skb_load_bytes(skb, at, chunk, n))
			return -1;
		sum = bpf_csum_diff(0, 0, chunk, CHUNK, folded(sum));
		at += n;
		left -= n;
	}
	check = ~folded(sum);
	if (udp && !check)
		check = 0xffff;
	return bpf_skb_store_bytes(skb, field, &check, sizeof check, 0);
}

/* Tell the kernel that nothing is left for the card. No helper says so; but where the headers are taken off beyond the point at
 * which summing would start, the kernel forgets about it (skb_postpull_rcsum), and they are put back. `l3` is the length of the IP
 * header, 20 or 40; what is taken off is four bytes more. The kernel wants an IP header's worth of bytes to remain, so a short
 * packet is made longer meanwhile. */
always_inline int forget_offload(struct __sk_buff *skb, __u32 l2, const __u32 l3)
{
	__u8 saved[44];
	__u32 before = skb->len, least = l2 + 2 * l3 + 4;

	if (bpf_skb_load_bytes(skb, l2, saved, l3 + 4))
		return -1;
	if (before < least && bpf_skb_change_tail(skb, least, 0))
		return -1;
	if (bpf_skb_adjust_room(skb, -(__s32)(l3 + 4), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO) ||
	    bpf_skb_adjust_room(skb, l3 + 4, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO) ||
	    bpf_skb_store_bytes(skb, l2, saved, l3 + 4, 0))
		return -1;
	return before < least ? bpf_skb_change_tail(skb, before, 0) : 0;
}

#endif
