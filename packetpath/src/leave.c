/* Packets from pods to other nodes.
 *
 *   TUN queue --read--> superpacket? --cut by iovecs--.
 *                       packet?      --collected------+--> sendmsg with UDP_SEGMENT: up to 64 datagrams at once
 *                       to nobody?   --ICMP error------> back to the pod, by a raw socket
 *
 * Payload is copied by the kernel alone. Sources: virtio_net.h, udp(7) UDP_SEGMENT, raw(7).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../include/np_icmp.h"
#include "worker.h"

#define LARGEST 65000 /* bytes in one send */
#define MOST 65507    /* bytes that UDP takes, over IPv4 */
#define ICMP_PER_SECOND 1000

static void complain(struct np_worker *w, struct buffers *b, const uint8_t *packet, const struct np_ip *ip, enum np_complaint what) {
    const struct np_address *own = &b->table->own[ip->version == 6];
    int side = ip->version == 6;
    uint8_t out[NP_ICMP_MAX];
    uint64_t second = np_now() / 1000000000u;
    if (second != b->icmp_second) {
        b->icmp_second = second;
        b->icmp_count = 0;
    }
    if (own->family == 0 || !np_may_complain(packet, ip) || b->icmp_count++ >= ICMP_PER_SECOND) {
        return;
    }
    uint32_t length = np_complain(packet, ip, own->bytes, what, MOST, out);
    union {
        struct sockaddr any;
        struct sockaddr_in four;
        struct sockaddr_in6 six;
    } to = {0};
    to.any.sa_family = side ? AF_INET6 : AF_INET;
    memcpy(side ? (void *)&to.six.sin6_addr : (void *)&to.four.sin_addr, packet + (side ? 8 : 12), side ? 16 : 4);
    if (sendto(w->forwarder->raw[side], out, length, MSG_DONTWAIT, &to.any, side ? sizeof to.six : sizeof to.four) < 0) {
        np_count(w, NP_WRITE_ERRORS, 1);
    }
}

static socklen_t address_of(const struct np_peer *peer, struct sockaddr_storage *to) {
    memset(to, 0, sizeof *to);
    if (peer->address.family == 4) {
        struct sockaddr_in *in = (struct sockaddr_in *)to;
        in->sin_family = AF_INET;
        in->sin_port = htons(peer->port);
        memcpy(&in->sin_addr, peer->address.bytes, 4);
        return sizeof *in;
    }
    struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)to;
    in6->sin6_family = AF_INET6;
    in6->sin6_port = htons(peer->port);
    memcpy(&in6->sin6_addr, peer->address.bytes, 16);
    return sizeof *in6;
}

/* Counts datagrams that were refused. A packet too large for UDP is one that a TUN with a larger MTU let through: its pod is told. */
static void refused(struct np_worker *w, struct buffers *b, const struct iovec *iov, int step, int n, int error) {
    struct np_ip ip;
    np_count(w, error == EMSGSIZE ? NP_COUNT_TOO_BIG : NP_SEND_ERRORS, (uint64_t)n);
    if (error == EMSGSIZE && step == 1 && np_parse(iov->iov_base, iov->iov_len, &ip) && ip.total > MOST) {
        complain(w, b, iov->iov_base, &ip, NP_TOO_BIG);
    }
}

/* Sends datagrams one by one: `step` iovecs each. */
static void send_singly(struct np_worker *w, struct buffers *b, int sock, struct msghdr *base, struct iovec *iov, int step, int n) {
    struct mmsghdr messages[BATCH] = {0};
    for (int i = 0; i < n; i++) {
        messages[i].msg_hdr = *base;
        messages[i].msg_hdr.msg_control = NULL;
        messages[i].msg_hdr.msg_controllen = 0;
        messages[i].msg_hdr.msg_iov = iov + i * step;
        messages[i].msg_hdr.msg_iovlen = (size_t)step;
    }
    for (int done = 0; done < n;) {
        int sent = sendmmsg(sock, messages + done, (unsigned)(n - done), 0);
        np_count(w, NP_SENDS, 1);
        if (sent <= 0) {
            refused(w, b, iov + done * step, step, 1, errno);
            sent = 1; /* the one that was refused; the others are tried */
        } else {
            for (int i = done; i < done + sent; i++) {
                np_count(w, NP_SENT_PACKETS, 1);
                np_count(w, NP_SENT_BYTES, messages[i].msg_len);
            }
        }
        done += sent;
    }
}

/* Sends `n` datagrams of `size` bytes (the last perhaps shorter) to a peer, `bytes` in all. */
static void send_many(struct np_worker *w, struct buffers *b, const struct np_peer *peer, int sock, struct iovec *iov, int step, int n,
                      uint32_t size, uint32_t bytes) {
    struct np_forwarder *f = w->forwarder;
    struct sockaddr_storage to;
    union {
        char bytes[CMSG_SPACE(sizeof(uint16_t))];
        struct cmsghdr align;
    } control = {0};
    int descriptor = f->send[peer->address.family == 6][sock];
    struct msghdr message = {&to, address_of(peer, &to), iov, (size_t)(step * n), NULL, 0, 0};
    if (descriptor < 0) {
        np_count(w, NP_SEND_ERRORS, (uint64_t)n);
        return;
    }
    if (n > 1) {
        if (atomic_load_explicit(&f->no_gso, memory_order_relaxed)) {
            send_singly(w, b, descriptor, &message, iov, step, n);
            return;
        }
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        struct cmsghdr *cmsg = CMSG_FIRSTHDR(&message);
        cmsg->cmsg_level = SOL_UDP;
        cmsg->cmsg_type = UDP_SEGMENT;
        cmsg->cmsg_len = CMSG_LEN(sizeof(uint16_t));
        uint16_t segment = (uint16_t)size;
        memcpy(CMSG_DATA(cmsg), &segment, sizeof segment);
    }
    np_count(w, NP_SENDS, 1);
    if (sendmsg(descriptor, &message, 0) >= 0) {
        np_count(w, NP_SENT_PACKETS, (uint64_t)n);
        np_count(w, NP_SENT_BYTES, bytes);
        return;
    }
    if (n > 1 && (errno == EIO || errno == EINVAL || errno == EMSGSIZE)) {
        if (errno == EIO) { /* a link without checksum offload: it will not get one soon */
            atomic_store(&f->no_gso, true);
        }
        send_singly(w, b, descriptor, &message, iov, step, n);
        return;
    }
    refused(w, b, iov, step, n, errno);
}

static void flush_pending(struct np_worker *w, struct buffers *b) {
    struct pending *p = &b->pending;
    if (p->count > 0) {
        send_many(w, b, p->peer, p->sock, p->iov, 1, (int)p->count, p->size, p->bytes);
    }
    p->count = p->bytes = 0;
}

static void send_super(struct np_worker *w, struct buffers *b, const struct np_peer *peer, int sock, const struct np_super *super) {
    uint32_t datagram = super->header + super->size, most = LARGEST / datagram;
    if (most > BATCH) {
        most = BATCH;
    }
    struct iovec iov[2 * BATCH];
    for (uint32_t first = 0; first < super->count; first += most) {
        uint32_t n = super->count - first < most ? super->count - first : most, bytes = 0;
        for (uint32_t i = 0; i < n; i++) {
            uint32_t slice = np_super_header(super, first + i, b->headers[i]);
            iov[2 * i] = (struct iovec){b->headers[i], super->header};
            iov[2 * i + 1] = (struct iovec){(uint8_t *)(uintptr_t)super->packet + super->header + (first + i) * super->size, slice};
            bytes += super->header + slice;
        }
        send_many(w, b, peer, sock, iov, 2, (int)n, datagram, bytes);
    }
}

/* Chooses a source port by the flow, so that a flow keeps its order. */
static int port_of(const uint8_t *packet, const struct np_ip *ip) {
    uint8_t key[16] = {0};
    memcpy(key, packet + (ip->version == 4 ? 12 : 16), 8);
    memcpy(key + 8, packet + (ip->version == 4 ? 12 : 32), 4);
    if (!ip->fragment && ip->header + 4 <= ip->total && (ip->protocol == NP_PROTO_TCP || ip->protocol == NP_PROTO_UDP)) {
        memcpy(key + 12, packet + ip->header, 4);
    }
    return (int)(np_hash(key, ip->protocol) % NP_SPREAD);
}

static void from_pod(struct np_worker *w, struct buffers *b, uint8_t *slot, size_t length) {
    struct virtio_net_hdr vnet;
    struct np_ip ip;
    const struct np_peer *peer;
    uint8_t *packet = slot + VNET;
    if (length < VNET) {
        np_count(w, NP_COUNT_MALFORMED, 1);
        return;
    }
    memcpy(&vnet, slot, VNET);
    enum np_fate fate = np_leaving(b->table, packet, length - VNET, &ip, &peer);
    if (fate != NP_GOES) {
        np_count(w, np_fate_counters[fate], 1);
        if (fate == NP_NO_ROUTE || fate == NP_TTL_EXCEEDED) {
            complain(w, b, packet, &ip, fate == NP_NO_ROUTE ? NP_NET_UNREACHABLE : NP_TIME_EXCEEDED);
        }
        return;
    }
    int sock = port_of(packet, &ip);
    if (vnet.gso_type != VIRTIO_NET_HDR_GSO_NONE) {
        struct np_super super;
        uint8_t kind = vnet.gso_type & (uint8_t)~VIRTIO_NET_HDR_GSO_ECN;
        uint8_t protocol = kind == GSO_UDP_L4 ? NP_PROTO_UDP : NP_PROTO_TCP;
        bool known = kind == GSO_UDP_L4 || kind == VIRTIO_NET_HDR_GSO_TCPV4 || kind == VIRTIO_NET_HDR_GSO_TCPV6;
        flush_pending(w, b);
        if (!known || !np_super_read(packet, &ip, vnet.csum_start, protocol, vnet.gso_size, &super)) {
            np_count(w, NP_COUNT_MALFORMED, 1);
            return;
        }
        send_super(w, b, peer, sock, &super);
        return;
    }
    if ((vnet.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) && !np_complete(packet, ip.total, vnet.csum_start, vnet.csum_offset)) {
        np_count(w, NP_COUNT_MALFORMED, 1);
        return;
    }
    struct pending *p = &b->pending;
    bool fits = p->count > 0 && p->peer == peer && p->sock == sock && ip.total <= p->size && p->bytes + ip.total <= LARGEST;
    if (!fits) {
        flush_pending(w, b);
        p->peer = peer;
        p->sock = sock;
        p->size = ip.total;
    }
    p->iov[p->count++] = (struct iovec){packet, ip.total};
    p->bytes += ip.total;
    if (p->count == BATCH || ip.total < p->size) {
        flush_pending(w, b);
    }
}

/* Returns whether there was anything. */
bool np_drain_tun(struct np_worker *w, struct buffers *b) {
    int n = 0;
    for (; n < BATCH; n++) {
        uint8_t *slot = b->slots + (size_t)n * SLOT;
        ssize_t length = read(w->queue, slot, SLOT);
        if (length < 0) {
            if (errno == EBADFD) {
                np_fail(w, EBADFD);
            }
            break;
        }
        from_pod(w, b, slot, (size_t)length);
    }
    flush_pending(w, b);
    return n > 0;
}
