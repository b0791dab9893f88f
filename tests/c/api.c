/* The packet path's headers as functions that Python can call: one for each of its twin (packetpath/reference.py). */
#include "../../packetpath/include/np_icmp.h"
#include "../../packetpath/include/np_judge.h"
#include "../../packetpath/include/np_merge.h"
#include "../../packetpath/include/np_segment.h"

void *api_table(const struct np_peer *peers, uint32_t count) {
    return np_table_make(peers, count);
}

void api_table_free(void *table) {
    np_table_free(table);
}

/* Returns the fate; `address` (16 bytes) and `port` are those of the peer of a packet that goes. */
int api_leave(const void *table, uint8_t *packet, size_t length, uint8_t *address, uint16_t *port) {
    struct np_ip ip;
    const struct np_peer *peer = NULL;
    enum np_fate fate = np_leaving(table, packet, length, &ip, &peer);
    if (fate == NP_GOES) {
        memcpy(address, peer->address.bytes, 16);
        *port = peer->port;
    }
    return fate;
}

int api_arrive(const void *table, uint8_t *packet, size_t length, const uint8_t *outer, int family) {
    struct np_address address = {.family = (uint8_t)family};
    struct np_ip ip;
    memcpy(address.bytes, outer, family == 4 ? 4 : 16);
    return np_arriving(table, packet, length, &address, &ip);
}

/* Cuts a superpacket; writes the packets one behind the other to `out`, their lengths to `lengths`. Returns how many, -1 for none. */
int api_segment(const uint8_t *packet, size_t length, uint32_t transport, int protocol, uint32_t size, uint8_t *out, uint32_t *lengths) {
    struct np_ip ip;
    struct np_super super;
    if (!np_parse(packet, length, &ip) || !np_super_read(packet, &ip, transport, (uint8_t)protocol, size, &super)) {
        return -1;
    }
    for (uint32_t i = 0; i < super.count; i++) {
        uint32_t slice = np_super_header(&super, i, out);
        memcpy(out + super.header, packet + super.header + i * super.size, slice);
        lengths[i] = super.header + slice;
        out += lengths[i];
    }
    return (int)super.count;
}

/* Joins packets, given one behind the other; writes what goes to the TUN to `out`, `sizes`: 0, or the size of a superpacket's segments. */
int api_merge(uint8_t *packets, const uint32_t *lengths, int n, int udp, uint8_t *out, uint32_t *out_lengths, uint32_t *sizes) {
    static struct np_merge merge;
    int written = 0;
    merge.packet = NULL;
    for (int i = 0; i <= n; i++) {
        struct np_ip ip;
        bool there = i < n && np_parse(packets, lengths[i], &ip);
        if (there && merge.packet != NULL && np_merge_join(&merge, packets, &ip)) {
            packets += lengths[i];
            continue;
        }
        if (merge.packet != NULL) {
            sizes[written] = merge.count > 1 ? merge.size : 0;
            out_lengths[written] = 0;
            if (merge.count > 1) {
                np_merge_finish(&merge);
            }
            for (uint32_t p = 1; p <= merge.count; p++) {
                memcpy(out, merge.pieces[p].iov_base, merge.pieces[p].iov_len);
                out += merge.pieces[p].iov_len;
                out_lengths[written] += (uint32_t)merge.pieces[p].iov_len;
            }
            written++;
            merge.packet = NULL;
        }
        if (there) {
            np_merge_begin(&merge, packets, &ip, udp != 0);
        }
        packets += i < n ? lengths[i] : 0;
    }
    return written;
}

/* Writes an ICMP error; returns its length, 0 where there must be none. */
int api_complain(const uint8_t *packet, size_t length, const uint8_t *own, int what, uint32_t mtu, uint8_t *out) {
    struct np_ip ip;
    if (!np_parse(packet, length, &ip) || !np_may_complain(packet, &ip)) {
        return 0;
    }
    return (int)np_complain(packet, &ip, own, (enum np_complaint)what, mtu, out);
}

int api_complete(uint8_t *packet, uint32_t length, uint32_t start, uint32_t offset) {
    return np_complete(packet, length, start, offset);
}
