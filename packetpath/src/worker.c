/* One worker for each queue of the TUN: what waits there and in its sockets goes on its way, then the worker rests.
 *
 *   TUN queue --leave.c--> UDP sockets of the other nodes          their packets --arrive.c--> TUN queue
 *
 * The TUN sends a flow to the queue on which its packets the other way were written (tun_automq), so both directions of a flow
 * stay with one worker. Also the exchange of the peer table under their eyes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "worker.h"

#define SPIN_NS 20000 /* so long a worker that was busy looks again before it sleeps */

const char *const np_counter_names[NP_COUNTERS] = {
    "sent_packets", "sent_bytes",  "received_packets", "received_bytes", "no_route",     "ttl_exceeded", "unknown_peer",
    "wrong_source", "malformed",   "too_big",          "send_errors",    "write_errors", "sends",        "writes",
};

const enum np_counter np_fate_counters[NP_FATES] = {
    [NP_NO_ROUTE] = NP_COUNT_NO_ROUTE,         [NP_TTL_EXCEEDED] = NP_COUNT_TTL_EXCEEDED,
    [NP_UNKNOWN_PEER] = NP_COUNT_UNKNOWN_PEER, [NP_WRONG_SOURCE] = NP_COUNT_WRONG_SOURCE,
    [NP_MALFORMED] = NP_COUNT_MALFORMED,
};

void np_fail(struct np_worker *w, int error) {
    int none = 0;
    atomic_compare_exchange_strong(&w->forwarder->failure, &none, error);
    eventfd_write(w->forwarder->wake, 1);
}

static void rest(struct np_worker *w) {
    struct pollfd fds[4] = {{w->queue, POLLIN, 0}, {w->sockets[0], POLLIN, 0}, {w->sockets[1], POLLIN, 0}, {w->forwarder->wake, POLLIN, 0}};
    atomic_store(&w->seen, UINT64_MAX); /* the table may go */
    if (poll(fds, 4, -1) > 0 && (fds[0].revents & (POLLERR | POLLNVAL)) && !(fds[0].revents & POLLIN)) {
        uint8_t byte;
        if (read(w->queue, &byte, 1) < 0 && errno != EAGAIN) { /* a TUN that was deleted; one that is down is waited for */
            if (errno == EBADFD) {
                np_fail(w, EBADFD);
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
        np_fail(w, ENOMEM);
        free(b);
        return NULL;
    }
    b->slots = memory;
    b->messages = memory + (size_t)BATCH * SLOT;
    uint64_t busy = 0;
    while (!atomic_load_explicit(&f->stopping, memory_order_relaxed) && atomic_load_explicit(&f->failure, memory_order_relaxed) == 0) {
        /* The generation first: a table that is freed was exchanged before it, so this sees the new one. */
        atomic_store(&w->seen, atomic_load(&f->generation));
        b->table = atomic_load(&f->table);
        bool any = np_drain_tun(w, b);
        for (int side = 0; side < 2; side++) {
            any |= w->sockets[side] >= 0 && np_drain_socket(w, b, w->sockets[side]);
        }
        if (any) {
            busy = 0;
            continue;
        }
        uint64_t now = np_now();
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
    eventfd_t before;
    atomic_store(&f->stopping, false);
    (void)!eventfd_read(f->wake, &before); /* of a stop that was taken back */
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
