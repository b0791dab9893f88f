/* What an IP packet says of itself, and one hop further: parsing, checksums, TTL. Reads only what it has checked.
 *
 *   [ IPv4 20..60 | TCP, UDP, ... ]        [ IPv6 40 | TCP, UDP, ... ]
 *
 * Packets here carry no link header. Sources: RFC 791, RFC 8200, RFC 1624 (checksum patch), RFC 1071 (checksum).
 */
#ifndef NP_PACKET_H
#define NP_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define NP_PROTO_ICMP 1
#define NP_PROTO_TCP 6
#define NP_PROTO_UDP 17
#define NP_PROTO_ICMPV6 58

struct np_address {
    uint8_t bytes[16]; /* IPv4 in the first four, the rest zero */
    uint8_t family;    /* 4 or 6 */
};

struct np_ip {
    uint8_t version;   /* 4 or 6 */
    uint8_t protocol;  /* of what follows the (first) header */
    uint8_t hops;      /* TTL or hop limit */
    bool fragment;     /* part of a fragmented IPv4 packet, or an IPv6 fragment header follows */
    bool first;        /* not a fragment, or its first */
    uint32_t header;   /* bytes before the transport header */
    uint32_t total;    /* bytes of the whole packet, as it says itself */
};

static inline uint16_t np_get16(const void *at) {
    const uint8_t *b = at;
    return (uint16_t)(b[0] << 8 | b[1]);
}

static inline uint32_t np_get32(const void *at) {
    const uint8_t *b = at;
    return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

static inline void np_put16(void *at, uint32_t value) {
    uint8_t *b = at;
    b[0] = (uint8_t)(value >> 8);
    b[1] = (uint8_t)value;
}

static inline void np_put32(void *at, uint32_t value) {
    uint8_t *b = at;
    b[0] = (uint8_t)(value >> 24);
    b[1] = (uint8_t)(value >> 16);
    b[2] = (uint8_t)(value >> 8);
    b[3] = (uint8_t)value;
}

/* Parses a packet of which `length` bytes are there. False: no IP packet, or shorter than it says. */
static inline bool np_parse(const uint8_t *packet, size_t length, struct np_ip *ip) {
    if (length < 20) {
        return false;
    }
    ip->version = packet[0] >> 4;
    if (ip->version == 4) {
        uint16_t offset = np_get16(packet + 6);
        ip->header = (uint32_t)(packet[0] & 15) * 4;
        ip->total = np_get16(packet + 2);
        ip->protocol = packet[9];
        ip->hops = packet[8];
        ip->fragment = (offset & 0x3fff) != 0;
        ip->first = (offset & 0x1fff) == 0;
        return ip->header >= 20 && ip->total >= ip->header && ip->total <= length;
    }
    if (ip->version != 6 || length < 40) {
        return false;
    }
    ip->header = 40;
    ip->total = 40 + (uint32_t)np_get16(packet + 4);
    ip->protocol = packet[6];
    ip->hops = packet[7];
    ip->fragment = ip->protocol == 44;
    ip->first = !ip->fragment || (ip->total >= 48 && ip->total <= length && (np_get16(packet + 42) & 0xfff8) == 0);
    return ip->total <= length;
}

static inline void np_source(const uint8_t *packet, const struct np_ip *ip, struct np_address *address) {
    memset(address, 0, sizeof *address);
    address->family = ip->version;
    memcpy(address->bytes, packet + (ip->version == 4 ? 12 : 8), ip->version == 4 ? 4 : 16);
}

static inline void np_destination(const uint8_t *packet, const struct np_ip *ip, struct np_address *address) {
    memset(address, 0, sizeof *address);
    address->family = ip->version;
    memcpy(address->bytes, packet + (ip->version == 4 ? 16 : 24), ip->version == 4 ? 4 : 16);
}

/* One hop less; false if that was the last. An IPv4 header's checksum is patched, not computed anew (RFC 1624, equation 3). */
static inline bool np_hop(uint8_t *packet, const struct np_ip *ip) {
    if (ip->hops <= 1) {
        return false;
    }
    if (ip->version == 6) {
        packet[7]--;
        return true;
    }
    uint16_t before = np_get16(packet + 8);
    packet[8]--;
    uint32_t sum = (uint32_t)(uint16_t)~np_get16(packet + 10) + (uint16_t)~before + np_get16(packet + 8);
    sum = (sum & 0xffff) + (sum >> 16);
    np_put16(packet + 10, (uint16_t) ~((sum & 0xffff) + (sum >> 16)));
    return true;
}

/* Adds bytes to a one's complement sum in the machine's own byte order: 32 bits at a time into 64, which compilers vectorise.
 * `length` may be odd; only the last piece of a sum may. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(NP_NO_CLONES)
__attribute__((target_clones("avx2", "default"), optimize("O3")))
#endif
static uint64_t np_sum(const uint8_t *data, size_t length, uint64_t sum) {
    size_t words = length / 4;
    for (size_t i = 0; i < words; i++) {
        uint32_t word;
        memcpy(&word, data + 4 * i, 4);
        sum += word;
    }
    uint32_t rest = 0;
    memcpy(&rest, data + 4 * words, length % 4);
    return sum + rest;
}

/* Folds a sum to 16 bits, still in the machine's order: to be stored with memcpy. */
static inline uint16_t np_fold(uint64_t sum) {
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

static inline void np_store_sum(uint8_t *at, uint16_t folded) {
    memcpy(at, &folded, 2);
}

/* The pseudo header of TCP and UDP (RFC 793, RFC 8200 section 8.1), as a sum. `length` is that of transport header and data. */
static inline uint64_t np_pseudo(const uint8_t *packet, uint8_t version, uint8_t protocol, uint32_t length) {
    uint8_t tail[8] = {0};
    np_put32(tail, length);
    tail[7] = protocol;
    uint64_t sum = version == 4 ? np_sum(packet + 12, 8, 0) : np_sum(packet + 8, 32, 0);
    return np_sum(tail, 8, sum);
}

static inline void np_header_checksum(uint8_t *packet, uint32_t header) {
    np_put16(packet + 10, 0);
    np_store_sum(packet + 10, (uint16_t)~np_fold(np_sum(packet, header, 0)));
}

/* Whether a TCP or UDP checksum is right; a UDP checksum of zero over IPv4 was not computed, which is right as well. */
static inline bool np_verify(const uint8_t *packet, const struct np_ip *ip) {
    uint32_t length = ip->total - ip->header;
    uint64_t sum = np_pseudo(packet, ip->version, ip->protocol, length);
    return np_fold(np_sum(packet + ip->header, length, sum)) == 0xffff;
}

#endif
