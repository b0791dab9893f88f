/* A superpacket cut into the packets that go over the wire: headers are made, the payload stays where it is.
 *
 *   [ IP | TCP | payload ...................... ]
 *   [ IP | TCP seq      | slice 0 ] [ IP | TCP seq + mss | slice 1 ] ...      iovecs: header, slice, header, slice
 *
 * As the kernel's own segmentation does it (tcp_offload.c, udp_offload.c): the IPv4 identification counts up, FIN and PSH are the
 * last one's, CWR the first one's, every checksum is complete.
 */
#ifndef NP_SEGMENT_H
#define NP_SEGMENT_H

#include "np_packet.h"

#define NP_MAX_HEADER 128 /* IPv4 60 + TCP 60, IPv6 40 + TCP 60 */
#define NP_MAX_SEGMENTS 2048 /* of 64 kB, at least 32 bytes each */

struct np_super {
    const uint8_t *packet; /* after its hop was taken */
    uint8_t version, protocol;
    uint32_t transport, header; /* offset of the transport header, bytes before the payload */
    uint32_t payload, size; /* bytes in all, and in each segment but the last */
    uint32_t count;
};

/* Reads a superpacket. `transport` is where its transport header begins, `size` the payload of a segment. False: none that can be cut. */
static inline bool np_super_read(const uint8_t *packet, const struct np_ip *ip, uint32_t transport, uint8_t protocol, uint32_t size,
                                 struct np_super *super) {
    uint32_t least = protocol == NP_PROTO_TCP ? 20 : 8;
    if (size == 0 || transport < ip->header || transport + least > ip->total) {
        return false;
    }
    uint32_t header = transport + (protocol == NP_PROTO_TCP ? (uint32_t)(packet[transport + 12] >> 4) * 4 : 8);
    if (header < transport + least || header > ip->total || header > NP_MAX_HEADER) {
        return false;
    }
    *super = (struct np_super){packet, ip->version, protocol, transport, header, ip->total - header, size, 0};
    super->count = (super->payload + size - 1) / size;
    return super->count > 0 && super->count <= NP_MAX_SEGMENTS;
}

/* Writes the header of segment `i` to `out` (np_super.header bytes); returns the length of its slice. */
static inline uint32_t np_super_header(const struct np_super *super, uint32_t i, uint8_t *out) {
    uint32_t start = i * super->size;
    uint32_t slice = super->payload - start < super->size ? super->payload - start : super->size;
    uint8_t *transport = out + super->transport;
    uint32_t length = super->header - super->transport + slice;
    memcpy(out, super->packet, super->header);
    if (super->version == 4) {
        np_put16(out + 2, super->header + slice);
        np_put16(out + 4, (uint32_t)np_get16(out + 4) + i);
        np_header_checksum(out, (uint32_t)(out[0] & 15) * 4);
    } else {
        np_put16(out + 4, super->header + slice - 40);
    }
    uint32_t at = 6;
    if (super->protocol == NP_PROTO_TCP) {
        at = 16;
        np_put32(transport + 4, np_get32(transport + 4) + start);
        transport[13] &= (uint8_t)(i + 1 < super->count ? ~0x09 : 0xff);
        transport[13] &= (uint8_t)(i > 0 ? ~0x80 : 0xff);
    } else {
        np_put16(transport + 4, length);
    }
    np_put16(transport + at, 0);
    uint64_t sum = np_pseudo(out, super->version, super->protocol, length);
    sum = np_sum(transport, super->header - super->transport, sum);
    uint16_t check = (uint16_t)~np_fold(np_sum(super->packet + super->header + start, slice, sum));
    if (check == 0 && super->protocol == NP_PROTO_UDP) {
        check = 0xffff;
    }
    np_store_sum(transport + at, check);
    return slice;
}

/* Completes a checksum that the sender left to the device: virtio's NEEDS_CSUM. False: it does not lie in the packet. */
static inline bool np_complete(uint8_t *packet, uint32_t total, uint32_t start, uint32_t offset) {
    if (start + offset + 2 > total) {
        return false;
    }
    uint16_t check = (uint16_t)~np_fold(np_sum(packet + start, total - start, 0));
    np_store_sum(packet + start + offset, check == 0 ? 0xffff : check);
    return true;
}

#endif
