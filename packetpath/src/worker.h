/* A worker's inside: what its two directions, leave.c and arrive.c, have in common. Nobody else includes this. */
#ifndef NP_WORKER_H
#define NP_WORKER_H

#include <linux/virtio_net.h>
#include <netinet/udp.h>
#include <time.h>

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
#define BATCH 64    /* packets from the TUN in one go, datagrams in one send */
#define MESSAGES 16 /* received in one go, of up to 64 kB each */

struct pending {
    const struct np_peer *peer;
    int sock;
    uint32_t size, count, bytes;
    struct iovec iov[BATCH];
};

struct buffers {
    const struct np_table *table;           /* of this round */
    uint8_t *slots;                         /* BATCH of SLOT bytes: from the TUN */
    uint8_t *messages;                      /* MESSAGES of 64 kB: from the sockets */
    uint8_t headers[BATCH][NP_MAX_HEADER];
    struct pending pending;
    struct np_merge merge;
    struct virtio_net_hdr vnet;
    uint64_t icmp_second;
    uint32_t icmp_count;
};

/* Where packets of a fate that is not NP_GOES are counted. */
extern const enum np_counter np_fate_counters[NP_FATES];

static inline void np_count(struct np_worker *w, enum np_counter counter, uint64_t n) {
    __atomic_store_n(&w->counters[counter], w->counters[counter] + n, __ATOMIC_RELAXED);
}

static inline uint64_t np_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Ends the process: `error` is what cannot be gone on with. */
void np_fail(struct np_worker *w, int error);

/* leave.c, arrive.c: what waits in the TUN, or in a socket, on its way. Each returns whether there was anything. */
bool np_drain_tun(struct np_worker *w, struct buffers *b);
bool np_drain_socket(struct np_worker *w, struct buffers *b, int sock);

#endif
