/* ICMP errors to pods: nobody has that address, the TTL ran out, the packet is too large for the tunnel.
 *
 * Never about an ICMP error, nor about any fragment but the first, nor to a source that is no single host (RFC 1122, 3.2.2;
 * RFC 4443, 2.4). flannel answers no ICMP packet at all; here an echo request is answered, so that ping says what is wrong.
 */
#ifndef NP_ICMP_H
#define NP_ICMP_H

#include "np_packet.h"

enum np_complaint { NP_NET_UNREACHABLE, NP_TIME_EXCEEDED, NP_TOO_BIG };

#define NP_ICMP_QUOTE4 28 /* IP header and eight bytes, as flannel quotes; with options more */
#define NP_ICMP_MAX 1280

static inline bool np_may_complain(const uint8_t *packet, const struct np_ip *ip) {
    if (!ip->first || ip->total <= ip->header) {
        return false;
    }
    uint8_t kind = packet[ip->header];
    if (ip->version == 4) {
        bool host = packet[12] != 0 && packet[12] < 224 && packet[16] < 224;
        bool error = ip->protocol == NP_PROTO_ICMP && kind != 8 && kind != 13;
        return host && !error;
    }
    static const uint8_t nobody[16] = {0};
    bool host = packet[8] != 0xff && memcmp(packet + 8, nobody, 16) != 0 && packet[24] != 0xff;
    return host && !(ip->protocol == NP_PROTO_ICMPV6 && kind < 128);
}

/* Writes an ICMP error about a packet, from `own` (4 or 16 bytes), to `out` (NP_ICMP_MAX bytes); returns its length. */
static inline uint32_t np_complain(const uint8_t *packet, const struct np_ip *ip, const uint8_t *own, enum np_complaint what,
                                   uint32_t mtu, uint8_t *out) {
    static const uint8_t kinds4[3][2] = {{3, 0}, {11, 0}, {3, 4}}, kinds6[3][2] = {{1, 0}, {3, 0}, {2, 0}};
    if (ip->version == 4) {
        uint32_t quote = ip->total < ip->header + 8 ? ip->total : ip->header + 8, total = 28 + quote;
        memset(out, 0, 28);
        out[0] = 0x45;
        np_put16(out + 2, total);
        out[8] = 64;
        out[9] = NP_PROTO_ICMP;
        memcpy(out + 12, own, 4);
        memcpy(out + 16, packet + 12, 4);
        np_header_checksum(out, 20);
        memcpy(out + 20, kinds4[what], 2);
        np_put16(out + 26, what == NP_TOO_BIG ? mtu : 0);
        memcpy(out + 28, packet, quote);
        np_store_sum(out + 22, (uint16_t)~np_fold(np_sum(out + 20, 8 + quote, 0)));
        return total;
    }
    uint32_t quote = ip->total < NP_ICMP_MAX - 48 ? ip->total : NP_ICMP_MAX - 48;
    memset(out, 0, 48);
    out[0] = 0x60;
    np_put16(out + 4, 8 + quote);
    out[6] = NP_PROTO_ICMPV6;
    out[7] = 64;
    memcpy(out + 8, own, 16);
    memcpy(out + 24, packet + 8, 16);
    memcpy(out + 40, kinds6[what], 2);
    np_put32(out + 44, what == NP_TOO_BIG ? mtu : 0);
    memcpy(out + 48, packet, quote);
    uint64_t sum = np_pseudo(out, 6, NP_PROTO_ICMPV6, 8 + quote);
    np_store_sum(out + 42, (uint16_t)~np_fold(np_sum(out + 40, 8 + quote, sum)));
    return 48 + quote;
}

#endif
