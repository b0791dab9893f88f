/* Packets, both ways, one worker for each queue of the TUN.
 *
 *   TUN queue --read--> superpacket? --cut by iovecs--.
 *                       packet?      --collected------+--> sendmsg with UDP_SEGMENT: up to 64 datagrams at once
 *   UDP socket --recvmmsg with UDP_GRO--> judged --> joined by iovecs --> writev to the TUN: up to 64 kB at once
 *
 * Payload is copied by the kernel alone. The TUN sends a flow to the queue on which its packets the other way were written
 * (tun_automq), so both directions of a flow stay with one worker. Sources: virtio_net.h, udp(7) UDP_SEGMENT and UDP_GRO.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/virtio_net.h>
#include <netinet/udp.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "../include/np_icmp.h"
#include "../include/np_merge.h"
#include "../include/np_segment.h"
#include "forwarder.h"

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif
#define GSO_UDP_L4 5 /* VIRTIO_NET_HDR_GSO_UDP_L4, younger than Debian 12's headers */

#define VNET 10
#define SLOT (VNET + 65536 + 64)
#define BATCH 64          /* packets from the TUN in one go, datagrams in one send */
#define MESSAGES 16       /* received in one go, of up to 64 kB each */
#define LARGEST 65000     /* bytes in one send; UDP takes 65,507 */
#define SPIN_NS 20000     /* so long a worker that was busy looks again before it sleeps */
#define ICMP_PER_SECOND 1000

struct pending {
    const struct np_peer *peer;
    int sock;
    uint32_t size, count, bytes;
    struct iovec iov[BATCH];
};

struct buffers {
    uint8_t *slots;                         /* BATCH of SLOT bytes: from the TUN */
    uint8_t *messages;                      /* MESSAGES of 64 kB: from the sockets */
    uint8_t headers[BATCH][NP_MAX_HEADER];
    struct pending pending;
    struct np_merge merge;
    struct virtio_net_hdr vnet;
    uint64_t icmp_second;
    uint32_t icmp_count;
};

const char *const np_counter_names[NP_COUNTERS] = {
    "sent_packets", "sent_bytes",  "received_packets", "received_bytes", "no_route",     "ttl_exceeded", "unknown_peer",
    "wrong_source", "malformed",   "too_big",          "send_errors",    "write_errors", "sends",        "writes",
};

static const enum np_counter fate_counters[NP_FATES] = {
    [NP_NO_ROUTE] = NP_COUNT_NO_ROUTE,         [NP_TTL_EXCEEDED] = NP_COUNT_TTL_EXCEEDED,
    [NP_UNKNOWN_PEER] = NP_COUNT_UNKNOWN_PEER, [NP_WRONG_SOURCE] = NP_COUNT_WRONG_SOURCE,
    [NP_MALFORMED] = NP_COUNT_MALFORMED,
};

static inline void count(struct np_worker *w, enum np_counter counter, uint64_t n) {
    __atomic_store_n(&w->counters[counter], w->counters[counter] + n, __ATOMIC_RELAXED);
}

static void fail(struct np_worker *w, int error) {
    int none = 0;
    atomic_compare_exchange_strong(&w->forwarder->failure, &none, error);
    eventfd_write(w->forwarder->wake, 1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* -- to the TUN ---------------------------------------------------------------------------------------------------- */

static void write_tun(struct np_worker *w, struct iovec *iov, int n) {
    count(w, NP_WRITES, 1);
    if (writev(w->queue, iov, n) < 0) {
        count(w, NP_WRITE_ERRORS, 1);
        if (errno == EBADFD) {
            fail(w, EBADFD);
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

static void complain(struct np_worker *w, struct buffers *b, const uint8_t *packet, const struct np_ip *ip, enum np_complaint what) {
    struct np_forwarder *f = w->forwarder;
    int side = ip->version == 6;
    uint8_t out[NP_ICMP_MAX];
    uint64_t second = now_ns() / 1000000000u;
    if (second != b->icmp_second) {
        b->icmp_second = second;
        b->icmp_count = 0;
    }
    if (!f->has_own[side] || !np_may_complain(packet, ip) || b->icmp_count++ >= ICMP_PER_SECOND) {
        return;
    }
    struct virtio_net_hdr none = {0};
    uint32_t length = np_complain(packet, ip, f->own[side], what, f->mtu, out);
    struct iovec iov[2] = {{&none, VNET}, {out, length}};
    write_tun(w, iov, 2);
}

/* -- to the other nodes -------------------------------------------------------------------------------------------- */

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

/* Sends datagrams one by one: `step` iovecs each. */
static void send_singly(struct np_worker *w, int sock, struct msghdr *base, struct iovec *iov, int step, int n) {
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
        count(w, NP_SENDS, 1);
        if (sent <= 0) {
            count(w, errno == EMSGSIZE ? NP_COUNT_TOO_BIG : NP_SEND_ERRORS, 1);
            sent = 1; /* the one that was refused; the others are tried */
        } else {
            for (int i = done; i < done + sent; i++) {
                count(w, NP_SENT_PACKETS, 1);
                count(w, NP_SENT_BYTES, messages[i].msg_len);
            }
        }
        done += sent;
    }
}

/* Sends `n` datagrams of `size` bytes (the last perhaps shorter) to a peer, `bytes` in all. */
static void send_many(struct np_worker *w, const struct np_peer *peer, int sock, struct iovec *iov, int step, int n, uint32_t size,
                      uint32_t bytes) {
    struct np_forwarder *f = w->forwarder;
    struct sockaddr_storage to;
    union {
        char bytes[CMSG_SPACE(sizeof(uint16_t))];
        struct cmsghdr align;
    } control = {0};
    int descriptor = f->send[peer->address.family == 6][sock];
    struct msghdr message = {&to, address_of(peer, &to), iov, (size_t)(step * n), NULL, 0, 0};
    if (descriptor < 0) {
        count(w, NP_SEND_ERRORS, (uint64_t)n);
        return;
    }
    if (n > 1) {
        if (atomic_load_explicit(&f->no_gso, memory_order_relaxed)) {
            send_singly(w, descriptor, &message, iov, step, n);
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
    count(w, NP_SENDS, 1);
    if (sendmsg(descriptor, &message, 0) >= 0) {
        count(w, NP_SENT_PACKETS, (uint64_t)n);
        count(w, NP_SENT_BYTES, bytes);
        return;
    }
    if (n > 1 && (errno == EIO || errno == EINVAL || errno == EMSGSIZE)) {
        if (errno == EIO) { /* a link without checksum offload: it will not get one soon */
            atomic_store(&f->no_gso, true);
        }
        send_singly(w, descriptor, &message, iov, step, n);
        return;
    }
    count(w, errno == EMSGSIZE ? NP_COUNT_TOO_BIG : NP_SEND_ERRORS, (uint64_t)n);
}

static void flush_pending(struct np_worker *w, struct buffers *b) {
    struct pending *p = &b->pending;
    if (p->count > 0) {
        send_many(w, p->peer, p->sock, p->iov, 1, (int)p->count, p->size, p->bytes);
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
        send_many(w, peer, sock, iov, 2, (int)n, datagram, bytes);
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

static void from_pod(struct np_worker *w, struct buffers *b, const struct np_table *table, uint8_t *slot, size_t length) {
    struct virtio_net_hdr vnet;
    struct np_ip ip;
    const struct np_peer *peer;
    uint8_t *packet = slot + VNET;
    if (length < VNET) {
        count(w, NP_COUNT_MALFORMED, 1);
        return;
    }
    memcpy(&vnet, slot, VNET);
    enum np_fate fate = np_leaving(table, packet, length - VNET, &ip, &peer);
    if (fate != NP_GOES) {
        count(w, fate_counters[fate], 1);
        if (fate == NP_NO_ROUTE || fate == NP_TTL_EXCEEDED) {
            complain(w, b, packet, &ip, fate == NP_NO_ROUTE ? NP_NET_UNREACHABLE : NP_TIME_EXCEEDED);
        }
        return;
    }
    int sock = port_of(packet, &ip);
    if (vnet.gso_type != VIRTIO_NET_HDR_GSO_NONE) {
        struct np_super super;
        uint8_t protocol = vnet.gso_type == GSO_UDP_L4 ? NP_PROTO_UDP : NP_PROTO_TCP;
        flush_pending(w, b);
        if (!np_super_read(packet, &ip, vnet.csum_start, protocol, vnet.gso_size, &super)) {
            count(w, NP_COUNT_MALFORMED, 1);
            return;
        }
        send_super(w, b, peer, sock, &super);
        return;
    }
    if ((vnet.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) && !np_complete(packet, ip.total, vnet.csum_start, vnet.csum_offset)) {
        count(w, NP_COUNT_MALFORMED, 1);
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
static bool drain_tun(struct np_worker *w, struct buffers *b, const struct np_table *table) {
    int n = 0;
    for (; n < BATCH; n++) {
        uint8_t *slot = b->slots + (size_t)n * SLOT;
        ssize_t length = read(w->queue, slot, SLOT);
        if (length < 0) {
            if (errno == EBADFD) {
                fail(w, EBADFD);
            }
            break;
        }
        from_pod(w, b, table, slot, (size_t)length);
    }
    flush_pending(w, b);
    return n > 0;
}

/* -- from the other nodes ------------------------------------------------------------------------------------------ */

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

static void to_pod(struct np_worker *w, struct buffers *b, const struct np_table *table, const struct np_address *outer, uint8_t *packet,
                   size_t length) {
    struct np_ip ip;
    enum np_fate fate = np_arriving(table, packet, length, outer, &ip);
    if (fate != NP_GOES) {
        count(w, fate_counters[fate], 1);
        return;
    }
    count(w, NP_RECEIVED_PACKETS, 1);
    count(w, NP_RECEIVED_BYTES, ip.total);
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
static bool drain_socket(struct np_worker *w, struct buffers *b, const struct np_table *table, int sock) {
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
            count(w, NP_COUNT_MALFORMED, 1);
            continue;
        }
        outer_address(&from[i], &outer);
        if (length == 0) {
            count(w, NP_COUNT_MALFORMED, 1);
        }
        for (uint32_t at = 0; at < length; at += size) {
            to_pod(w, b, table, &outer, b->messages + (size_t)i * 65536 + at, length - at < size ? length - at : size);
        }
    }
    flush_merge(w, b);
    return n > 0;
}

/* -- the loop ------------------------------------------------------------------------------------------------------ */

static void rest(struct np_worker *w) {
    struct pollfd fds[4] = {{w->queue, POLLIN, 0}, {w->sockets[0], POLLIN, 0}, {w->sockets[1], POLLIN, 0}, {w->forwarder->wake, POLLIN, 0}};
    atomic_store(&w->seen, UINT64_MAX); /* the table may go */
    if (poll(fds, 4, -1) > 0 && (fds[0].revents & (POLLERR | POLLNVAL)) && !(fds[0].revents & POLLIN)) {
        uint8_t byte;
        if (read(w->queue, &byte, 1) < 0 && errno != EAGAIN) { /* a TUN that was deleted; one that is down is waited for */
            if (errno == EBADFD) {
                fail(w, EBADFD);
            } else {
                poll(&fds[3], 1, 100);
            }
        }
    }
}

static void *work(void *argument) {
    struct np_worker *w = argument;
    struct np_forwarder *f = w->forwarder;
    struct buffers *b = calloc(1, sizeof *b);
    size_t room = (size_t)BATCH * SLOT + (size_t)MESSAGES * 65536;
    uint8_t *memory = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b == NULL || memory == MAP_FAILED) {
        fail(w, ENOMEM);
        free(b);
        return NULL;
    }
    b->slots = memory;
    b->messages = memory + (size_t)BATCH * SLOT;
    uint64_t busy = 0;
    while (!atomic_load_explicit(&f->stopping, memory_order_relaxed) && atomic_load_explicit(&f->failure, memory_order_relaxed) == 0) {
        /* The generation first: a table that is freed was exchanged before it, so this sees the new one. */
        atomic_store(&w->seen, atomic_load(&f->generation));
        const struct np_table *table = atomic_load(&f->table);
        bool any = drain_tun(w, b, table);
        for (int side = 0; side < 2; side++) {
            any |= w->sockets[side] >= 0 && drain_socket(w, b, table, w->sockets[side]);
        }
        if (any) {
            busy = 0;
            continue;
        }
        uint64_t now = now_ns();
        if (busy == 0) {
            busy = now;
        } else if (now - busy > SPIN_NS) {
            rest(w);
            busy = 0;
        } else {
            sched_yield(); /* whoever has the next packet may need this very core */
        }
    }
    atomic_store(&w->seen, UINT64_MAX);
    munmap(memory, room);
    free(b);
    return NULL;
}

const char *np_start_workers(struct np_forwarder *f) {
    atomic_store(&f->stopping, false);
    for (int i = 0; i < f->queues; i++) {
        struct np_worker *w = &f->workers[i];
        w->forwarder = f;
        w->index = i;
        atomic_store(&w->seen, UINT64_MAX);
        if (pthread_create(&w->thread, NULL, work, w) != 0) {
            f->queues = i;
            np_stop_workers(f);
            return "no thread for a worker";
        }
    }
    return NULL;
}

void np_stop_workers(struct np_forwarder *f) {
    atomic_store(&f->stopping, true);
    eventfd_write(f->wake, 1);
    for (int i = 0; i < f->queues; i++) {
        pthread_join(f->workers[i].thread, NULL);
    }
}

/* Exchanges the table and frees the old one when no worker looks at it any more. */
void np_exchange(struct np_forwarder *f, struct np_table *table) {
    struct np_table *old = atomic_exchange(&f->table, table);
    uint64_t generation = atomic_fetch_add(&f->generation, 1) + 1;
    for (int i = 0; i < f->queues; i++) {
        while (atomic_load(&f->workers[i].seen) < generation && !atomic_load(&f->stopping)) {
            sched_yield(); /* one round of a worker: microseconds */
        }
    }
    np_table_free(old);
}
