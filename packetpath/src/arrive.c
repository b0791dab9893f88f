/* Packets from other nodes to pods.
 *
 *   UDP socket --recvmmsg with UDP_GRO--> judged --> joined by iovecs --> writev to the TUN: up to 64 kB at once
 *
 * Payload is copied by the kernel alone. Sources: virtio_net.h, udp(7) UDP_GRO.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include "worker.h"

static void write_tun(struct np_worker *w, struct iovec *iov, int n) {
    np_count(w, NP_WRITES, 1);
    if (writev(w->queue, iov, n) < 0) {
        np_count(w, NP_WRITE_ERRORS, 1);
        if (errno == EBADFD) {
            np_fail(w, EBADFD);
        }
    }
}

static void flush_merge(struct np_worker *w, struct buffers *b) {
    struct np_merge *m = &b->merge;
    if (m->packet == NULL) {
        return;
    }
    memset(&b->vnet, 0, sizeof b->vnet);
    if (m->count > 1) {
        bool tcp = m->ip.protocol == NP_PROTO_TCP;
        np_merge_finish(m);
        b->vnet = (struct virtio_net_hdr){
            .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
            .gso_type = (uint8_t)(!tcp ? GSO_UDP_L4 : m->ip.version == 4 ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_TCPV6),
            .hdr_len = (uint16_t)m->header,
            .gso_size = (uint16_t)m->size,
            .csum_start = (uint16_t)m->ip.header,
            .csum_offset = tcp ? 16 : 6,
        };
    }
    m->pieces[0] = (struct iovec){&b->vnet, VNET};
    write_tun(w, m->pieces, (int)m->count + 1);
    m->packet = NULL;
}

static void outer_address(const struct sockaddr_storage *from, struct np_address *outer) {
    memset(outer, 0, sizeof *outer);
    if (from->ss_family == AF_INET) {
        outer->family = 4;
        memcpy(outer->bytes, &((const struct sockaddr_in *)from)->sin_addr, 4);
    } else {
        outer->family = 6;
        memcpy(outer->bytes, &((const struct sockaddr_in6 *)from)->sin6_addr, 16);
    }
}

static void to_pod(struct np_worker *w, struct buffers *b, const struct np_address *outer, uint8_t *packet, size_t length) {
    struct np_ip ip;
    enum np_fate fate = np_arriving(b->table, packet, length, outer, &ip);
    if (fate != NP_GOES) {
        np_count(w, np_fate_counters[fate], 1);
        return;
    }
    np_count(w, NP_RECEIVED_PACKETS, 1);
    np_count(w, NP_RECEIVED_BYTES, ip.total);
    if (b->merge.packet != NULL && np_merge_join(&b->merge, packet, &ip)) {
        return;
    }
    flush_merge(w, b);
    np_merge_begin(&b->merge, packet, &ip, w->forwarder->uso);
}

static uint32_t segment_size(struct msghdr *message, uint32_t length) {
    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c != NULL; c = CMSG_NXTHDR(message, c)) {
        if (c->cmsg_level == SOL_UDP && c->cmsg_type == UDP_GRO) {
            int size;
            memcpy(&size, CMSG_DATA(c), sizeof size);
            if (size > 0) {
                return (uint32_t)size;
            }
        }
    }
    return length;
}

/* Returns whether there was anything. */
bool np_drain_socket(struct np_worker *w, struct buffers *b, int sock) {
    struct mmsghdr messages[MESSAGES] = {0};
    struct iovec iov[MESSAGES];
    struct sockaddr_storage from[MESSAGES];
    union {
        char bytes[CMSG_SPACE(sizeof(int)) + CMSG_SPACE(64)];
        struct cmsghdr align;
    } control[MESSAGES];
    for (int i = 0; i < MESSAGES; i++) {
        iov[i] = (struct iovec){b->messages + (size_t)i * 65536, 65536};
        messages[i].msg_hdr = (struct msghdr){&from[i], sizeof from[i], &iov[i], 1, control[i].bytes, sizeof control[i].bytes, 0};
    }
    int n = recvmmsg(sock, messages, MESSAGES, MSG_DONTWAIT, NULL);
    for (int i = 0; i < n; i++) {
        struct np_address outer;
        uint32_t length = messages[i].msg_len, size = segment_size(&messages[i].msg_hdr, length);
        if (messages[i].msg_hdr.msg_flags & MSG_TRUNC) {
            np_count(w, NP_COUNT_MALFORMED, 1);
            continue;
        }
        outer_address(&from[i], &outer);
        if (length == 0) {
            np_count(w, NP_COUNT_MALFORMED, 1);
        }
        for (uint32_t at = 0; at < length; at += size) {
            to_pod(w, b, &outer, b->messages + (size_t)i * 65536 + at, length - at < size ? length - at : size);
        }
    }
    flush_merge(w, b);
    return n > 0;
}
