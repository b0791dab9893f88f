/* Packets that follow one another in a flow, put together to one superpacket again: the opposite of np_segment.h.
 *
 *   [ IP | TCP | a ] [ IP | TCP | b ] [ IP | TCP | c ]   -->   [ IP | TCP | a b c ], by iovecs: nothing is copied here
 *
 * Joins only what the kernel's GRO would (tcp_offload.c, udp_offload.c): same ends, options, window and acknowledgement, no flag
 * but ACK (PSH ends it), each as long as the first, the last perhaps shorter, and every checksum right: what goes on as one has one
 * checksum that is computed anew, and must not hide a wrong one.
 */
#ifndef NP_MERGE_H
#define NP_MERGE_H

#include <sys/uio.h>

#include "np_packet.h"

#define NP_MERGE_PIECES 128 /* packets in one; the kernel cuts UDP into at most 128 */

struct np_merge {
    uint8_t *packet; /* the first one, whose headers count; NULL: nothing waits */
    struct np_ip ip;
    uint32_t header, size; /* bytes before the payload; payload of each packet */
    uint32_t count, payload, next; /* packets, bytes of payload, the sequence number that must follow */
    bool closed; /* nothing may follow: PSH, or a shorter packet */
    bool verified; /* the first one's checksum was found right; looked at only when a second one comes */
    struct iovec pieces[NP_MERGE_PIECES + 2]; /* [0] is the caller's, [1] the headers with the first payload */
};

static inline uint32_t np_payload_at(const uint8_t *packet, const struct np_ip *ip, bool udp) {
    uint32_t least = ip->header + (ip->protocol == NP_PROTO_TCP ? 20 : 8);
    if (ip->fragment || (ip->version == 4 && ip->header != 20) || ip->total <= least) {
        return 0;
    }
    if (ip->protocol == NP_PROTO_UDP) {
        bool whole = np_get16(packet + ip->header + 4) == ip->total - ip->header && np_get16(packet + ip->header + 6) != 0;
        return udp && whole ? least : 0;
    }
    if (ip->protocol != NP_PROTO_TCP) {
        return 0;
    }
    uint32_t at = ip->header + (uint32_t)(packet[ip->header + 12] >> 4) * 4;
    bool plain = (packet[ip->header + 13] & ~0x08) == 0x10; /* ACK, perhaps PSH */
    return plain && at >= least && at < ip->total && at <= 120 ? at : 0;
}

/* Whether two packets' headers are those of one flow, one after the other. */
static inline bool np_same_flow(const uint8_t *a, const uint8_t *b, const struct np_ip *ip, uint32_t header) {
    if (ip->version == 4) {
        if (a[1] != b[1] || a[8] != b[8] || np_get16(a + 6) != np_get16(b + 6) || memcmp(a + 12, b + 12, 8) != 0) {
            return false;
        }
    } else if (memcmp(a, b, 4) != 0 || a[7] != b[7] || memcmp(a + 8, b + 8, 32) != 0) {
        return false;
    }
    const uint8_t *x = a + ip->header, *y = b + ip->header;
    if (ip->protocol == NP_PROTO_UDP) {
        return memcmp(x, y, 4) == 0;
    }
    return memcmp(x, y, 4) == 0 && memcmp(x + 8, y + 8, 5) == 0 && memcmp(x + 14, y + 14, 2) == 0 &&
           memcmp(x + 18, y + 18, header - ip->header - 18) == 0;
}

/* Begins with a packet that came in. `udp`: whether UDP can be joined. */
static inline void np_merge_begin(struct np_merge *merge, uint8_t *packet, const struct np_ip *ip, bool udp) {
    uint32_t header = np_payload_at(packet, ip, udp);
    merge->packet = packet;
    merge->ip = *ip;
    merge->header = header;
    merge->size = merge->payload = header ? ip->total - header : 0;
    merge->count = 1;
    merge->verified = false;
    merge->closed = header == 0 || (ip->protocol == NP_PROTO_TCP && (packet[ip->header + 13] & 0x08));
    merge->next = header && ip->protocol == NP_PROTO_TCP ? np_get32(packet + ip->header + 4) + merge->size : 0;
    merge->pieces[1] = (struct iovec){packet, ip->total};
}

/* Joins a packet to what waits; false: it does not belong there. */
static inline bool np_merge_join(struct np_merge *merge, uint8_t *packet, const struct np_ip *ip) {
    if (merge->closed || ip->version != merge->ip.version || ip->protocol != merge->ip.protocol ||
        ip->header != merge->ip.header || merge->count == NP_MERGE_PIECES) {
        return false;
    }
    uint32_t header = np_payload_at(packet, ip, true);
    uint32_t payload = ip->total - header;
    if (header != merge->header || payload > merge->size || merge->header + merge->payload + payload > 65535 ||
        !np_same_flow(merge->packet, packet, ip, header)) {
        return false;
    }
    bool tcp = ip->protocol == NP_PROTO_TCP;
    if (!merge->verified) {
        merge->verified = np_verify(merge->packet, &merge->ip);
        merge->closed = !merge->verified;
    }
    if (merge->closed || (tcp && np_get32(packet + ip->header + 4) != merge->next) || !np_verify(packet, ip)) {
        return false;
    }
    merge->count++;
    merge->payload += payload;
    merge->next += payload;
    merge->pieces[merge->count] = (struct iovec){packet + header, payload};
    if (tcp && (packet[ip->header + 13] & 0x08)) {
        merge->packet[ip->header + 13] |= 0x08;
        merge->closed = true;
    }
    merge->closed = merge->closed || payload < merge->size;
    return true;
}

/* Makes the first packet's headers those of the whole; its transport checksum becomes that of the pseudo header alone, for whoever
 * sends or takes it to complete (NEEDS_CSUM). To be called when more than one was joined. */
static inline void np_merge_finish(struct np_merge *merge) {
    uint8_t *packet = merge->packet;
    uint32_t total = merge->header + merge->payload, length = total - merge->ip.header;
    if (merge->ip.version == 4) {
        np_put16(packet + 2, total);
        np_header_checksum(packet, merge->ip.header);
    } else {
        np_put16(packet + 4, total - 40);
    }
    if (merge->ip.protocol == NP_PROTO_UDP) {
        np_put16(packet + merge->ip.header + 4, length);
    }
    uint16_t pseudo = np_fold(np_pseudo(packet, merge->ip.version, merge->ip.protocol, length));
    np_store_sum(packet + merge->ip.header + (merge->ip.protocol == NP_PROTO_TCP ? 16 : 6), pseudo);
}

#endif
