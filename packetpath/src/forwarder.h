/* The forwarder's parts and what they share.
 *
 *   main.c      arguments, start, end          worker.c    one thread for each queue of the TUN; leave.c, arrive.c: its packets
 *   control.c   the control socket             sockets.c   TUN queues, UDP sockets, descriptors of a process that is replaced
 *
 * Workers share nothing that is written on their way: the table is exchanged whole, counters are each worker's own.
 */
#ifndef NP_FORWARDER_H
#define NP_FORWARDER_H

#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>

#include "../include/np_judge.h"

#define NP_VERSION "0.1.0"
#define NP_MAX_QUEUES 32
#define NP_SPREAD 8 /* source ports: switches and receivers spread flows by them */

enum np_counter {
    NP_SENT_PACKETS,
    NP_SENT_BYTES,
    NP_RECEIVED_PACKETS,
    NP_RECEIVED_BYTES,
    NP_COUNT_NO_ROUTE,
    NP_COUNT_TTL_EXCEEDED,
    NP_COUNT_UNKNOWN_PEER,
    NP_COUNT_WRONG_SOURCE,
    NP_COUNT_MALFORMED,
    NP_COUNT_TOO_BIG,
    NP_SEND_ERRORS,
    NP_WRITE_ERRORS,
    NP_SENDS,
    NP_WRITES,
    NP_COUNTERS
};
extern const char *const np_counter_names[NP_COUNTERS];

struct np_worker {
    struct np_forwarder *forwarder;
    pthread_t thread;
    int index, queue, sockets[2]; /* a queue of the TUN; sockets that receive IPv4 and IPv6, -1: none */
    atomic_uint_least64_t seen;   /* generation of the table in use; UINT64_MAX: none */
    uint64_t counters[NP_COUNTERS];
};

struct np_forwarder {
    char tun[16];
    uint16_t port;
    bool has_local[2];
    struct sockaddr_storage local[2]; /* outer addresses of this node, IPv4 and IPv6 */
    int queues;
    struct np_worker workers[NP_MAX_QUEUES];
    int send[2][NP_SPREAD];
    int raw[2]; /* ICMP errors to pods leave here: from the TUN the kernel takes no packet with an address of its own as source */
    _Atomic(struct np_table *) table;
    atomic_uint_least64_t generation;
    atomic_bool stopping, no_gso;
    bool uso; /* the TUN takes and gives superpackets of UDP */
    int wake; /* eventfd: readable once workers should end, or one has failed */
    atomic_int failure;   /* errno of what cannot be gone on with */
};

/* sockets.c. Each returns a message for people, NULL for done. */
const char *np_open(struct np_forwarder *f, const char *take_over_from, struct np_peer **peers, uint32_t *count);
const char *np_hand_over(struct np_forwarder *f, int client);
void np_find_own(const struct np_forwarder *f, struct np_table *table);

/* worker.c */
const char *np_start_workers(struct np_forwarder *f);
void np_stop_workers(struct np_forwarder *f);
void np_exchange(struct np_forwarder *f, struct np_table *table);

/* control.c: serves until it is told to end; returns the exit code. */
int np_serve(struct np_forwarder *f, const char *path, struct np_peer *peers, uint32_t count);
bool np_parse_peer(char *words, struct np_peer *peer, const char **problem);

#endif
