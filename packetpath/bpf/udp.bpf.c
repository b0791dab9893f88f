/* The UDP tunnel in the kernel: wraps what leaves through flannel0, unwraps what comes in from peers, and leaves the rest.
 *
 *     pod --> route Network dev flannel0 --> encap --> eth0 --> [IP | UDP 8285 | the packet itself]
 *                                              '-- no peer, TTL over, too big, ... --> TUN --> forwarder (userspace), which answers
 *
 *     pod <-- flannel0 <-- decap <-- eth0
 *                            '-- fragments, TTL over, ... --> UDP socket --> forwarder
 *
 * A peer is believed if the inner source is behind its outer address (places.h). The outer UDP checksum is 0: the inner packet has
 * its own, over its addresses as well, and the outer addresses are compared with a table. Allowed for IPv4, and for tunnels over
 * IPv6 by RFC 6935 and 6936; receivers in user space need UDP_NO_CHECK6_RX there. It also keeps the card's GRO from putting several
 * datagrams into one for the forwarder's socket (udp_gro_receive_segment), which would be past unwrapping here.
 *
 * What is unwrapped has come in through flannel0 as far as rules and rp_filter can see, as with the forwarder.
 *
 * Source: flannel pkg/backend/udp/proxy_amd64.c (format, TTL); net/core/filter.c (bpf_skb_adjust_room, bpf_redirect_neigh). */
#include "unwrap.h"
#include "wrap.h"

SEC("tc")
int np_udp_encap(struct __sk_buff *skb)
{
	const struct settings *s = get_settings();

	if (!s)
		return NEXT;
	return s->tunnel_header ? encap_family(skb, s, ETH_HLEN) : encap_family(skb, s, 0);
}

SEC("tc")
int np_udp_decap(struct __sk_buff *skb)
{
	const struct settings *s = get_settings();

	if (!s || skb->vlan_present || skb->pkt_type)
		return NEXT;
	return s->uplink_header ? decap_family(skb, s, ETH_HLEN) : decap_family(skb, s, 0);
}

/* At the far end of the way that merges segments: what comes out there has come in through the tunnel. */
SEC("tc")
int np_udp_arrive(struct __sk_buff *skb __attribute__((unused)))
{
	const struct settings *s = get_settings();

	return s ? bpf_redirect(s->tunnel, BPF_F_INGRESS) : TC_ACT_SHOT;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
