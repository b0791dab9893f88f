/* The control socket: lines of text in one message, answered by `ok` or `error WORDS`; and the end of the process.
 *
 *   peers begin | peer PREFIX ADDRESS PORT ... | peers commit      the whole table at once
 *   peer PREFIX ADDRESS PORT | forget PREFIX                       one of it
 *   show peers | show counters | show version | take-over | stop
 *
 * A person can talk to it: socat - UNIX-CONNECT:/run/nodeplane/forwarder.sock,type=5
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "forwarder.h"

#define CLIENTS 32
#define MESSAGE (1 << 16)

struct client {
    int sock; /* -1: free */
    bool staging;
    struct np_peer *staged;
    uint32_t staged_count;
};

struct server {
    struct np_forwarder *f;
    struct np_peer *peers;
    uint32_t count;
    struct client clients[CLIENTS];
    bool done;
    char request[MESSAGE], answer[MESSAGE];
    size_t length;
    struct client *asking;
};

/* -- words --------------------------------------------------------------------------------------------------------- */

static bool parse_address(const char *text, struct np_address *address) {
    memset(address, 0, sizeof *address);
    address->family = strchr(text, ':') ? 6 : 4;
    return inet_pton(address->family == 6 ? AF_INET6 : AF_INET, text, address->bytes) == 1;
}

static bool parse_prefix(char *text, struct np_peer *peer) {
    char *slash = strchr(text, '/'), *end;
    if (slash == NULL || slash[1] == 0) {
        return false;
    }
    *slash = 0;
    bool right = parse_address(text, &peer->prefix);
    *slash = '/';
    long length = strtol(slash + 1, &end, 10);
    if (!right || *end != 0 || length < 0 || length > (peer->prefix.family == 4 ? 32 : 128)) {
        return false;
    }
    peer->length = (uint8_t)length;
    struct np_address masked = peer->prefix;
    np_mask(&masked, peer->length);
    return np_same(&masked, &peer->prefix);
}

/* Reads `PREFIX ADDRESS PORT`. */
bool np_parse_peer(char *words, struct np_peer *peer, const char **problem) {
    char *prefix = strsep(&words, " "), *address = strsep(&words, " "), *port = strsep(&words, " "), *end;
    memset(peer, 0, sizeof *peer);
    *problem = NULL;
    if (prefix == NULL || address == NULL || port == NULL || words != NULL) {
        *problem = "must be: peer PREFIX ADDRESS PORT";
    } else if (!parse_prefix(prefix, peer)) {
        *problem = "the prefix must be like 10.244.2.0/24, without host bits";
    } else if (!parse_address(address, &peer->address)) {
        *problem = "the address must be an IP address";
    } else {
        long number = strtol(port, &end, 10);
        peer->port = (uint16_t)number;
        if (*end != 0 || number < 1 || number > 65535) {
            *problem = "the port must be between 1 and 65535";
        }
    }
    return *problem == NULL;
}

static int by_prefix(const void *a, const void *b) {
    const struct np_peer *x = a, *y = b;
    int order = x->prefix.family - y->prefix.family;
    order = order ? order : memcmp(x->prefix.bytes, y->prefix.bytes, 16);
    return order ? order : x->length - y->length;
}

/* -- answers ------------------------------------------------------------------------------------------------------- */

static void deliver(struct server *s) {
    if (s->length > 0) {
        (void)!send(s->asking->sock, s->answer, s->length, MSG_NOSIGNAL);
        s->length = 0;
    }
}

__attribute__((format(printf, 2, 3))) static void answer(struct server *s, const char *form, ...) {
    va_list arguments;
    if (s->length > MESSAGE / 2) {
        deliver(s);
    }
    va_start(arguments, form);
    int length = vsnprintf(s->answer + s->length, MESSAGE - s->length, form, arguments);
    va_end(arguments);
    s->length += length > 0 ? (size_t)length : 0;
}

static void show_peers(struct server *s) {
    qsort(s->peers, s->count, sizeof *s->peers, by_prefix);
    for (uint32_t i = 0; i < s->count; i++) {
        const struct np_peer *p = &s->peers[i];
        char prefix[INET6_ADDRSTRLEN], address[INET6_ADDRSTRLEN];
        inet_ntop(p->prefix.family == 6 ? AF_INET6 : AF_INET, p->prefix.bytes, prefix, sizeof prefix);
        inet_ntop(p->address.family == 6 ? AF_INET6 : AF_INET, p->address.bytes, address, sizeof address);
        answer(s, "peer %s/%u %s %u\n", prefix, p->length, address, p->port);
    }
}

static void show_counters(struct server *s) {
    for (int c = 0; c < NP_COUNTERS; c++) {
        uint64_t total = 0;
        for (int i = 0; i < s->f->queues; i++) {
            total += __atomic_load_n(&s->f->workers[i].counters[c], __ATOMIC_RELAXED);
        }
        answer(s, "%s %llu\n", np_counter_names[c], (unsigned long long)total);
    }
}

static void show_version(struct server *s) {
    answer(s, "nodeplane-udp %s\npid %d\ntun %s\nport %u\nqueues %d\n", NP_VERSION, (int)getpid(), s->f->tun, s->f->port, s->f->queues);
    answer(s, "udp-superpackets %s\nudp-segment %s\n", s->f->uso ? "yes" : "no", atomic_load(&s->f->no_gso) ? "no" : "yes");
}

/* -- the table ----------------------------------------------------------------------------------------------------- */

/* Puts one peer into an array in the place of one with its prefix; false: no memory. */
static bool put(struct np_peer **peers, uint32_t *count, const struct np_peer *peer) {
    for (uint32_t i = 0; i < *count; i++) {
        if ((*peers)[i].length == peer->length && np_same(&(*peers)[i].prefix, &peer->prefix)) {
            (*peers)[i] = *peer;
            return true;
        }
    }
    struct np_peer *more = realloc(*peers, (*count + 1) * sizeof *more);
    if (more == NULL) {
        return false;
    }
    *peers = more;
    more[(*count)++] = *peer;
    return true;
}

static const char *publish(struct server *s) {
    struct np_table *table = np_table_make(s->peers, s->count);
    if (table == NULL) {
        return "no memory for the table";
    }
    np_find_own(s->f, table); /* the TUN may have been given its address only now */
    np_exchange(s->f, table);
    return NULL;
}

static const char *forget(struct server *s, char *text) {
    struct np_peer peer = {0};
    if (!parse_prefix(text, &peer)) {
        return "the prefix must be like 10.244.2.0/24, without host bits";
    }
    for (uint32_t i = 0; i < s->count; i++) {
        if (s->peers[i].length == peer.length && np_same(&s->peers[i].prefix, &peer.prefix)) {
            s->peers[i] = s->peers[--s->count];
            return NULL;
        }
    }
    return NULL; /* gone already */
}

static const char *commit(struct server *s) {
    struct client *c = s->asking;
    if (!c->staging) {
        return "peers commit without peers begin";
    }
    free(s->peers);
    s->peers = c->staged;
    s->count = c->staged_count;
    c->staged = NULL;
    c->staged_count = 0;
    c->staging = false;
    return NULL;
}

/* Does one line; `changed` becomes true if the table did. */
static const char *obey(struct server *s, char *line, bool *changed) {
    struct client *c = s->asking;
    const char *problem = NULL;
    struct np_peer peer;
    if (strcmp(line, "peers begin") == 0) {
        free(c->staged);
        c->staged = NULL;
        c->staged_count = 0;
        c->staging = true;
    } else if (strcmp(line, "peers commit") == 0) {
        problem = commit(s);
        *changed = *changed || problem == NULL;
    } else if (strncmp(line, "peer ", 5) == 0) {
        if (!np_parse_peer(line + 5, &peer, &problem)) {
            return problem;
        }
        bool done = c->staging ? put(&c->staged, &c->staged_count, &peer) : put(&s->peers, &s->count, &peer);
        *changed = *changed || !c->staging;
        problem = done ? NULL : "no memory";
    } else if (strncmp(line, "forget ", 7) == 0) {
        problem = forget(s, line + 7);
        *changed = *changed || problem == NULL;
    } else if (strcmp(line, "show peers") == 0) {
        show_peers(s);
    } else if (strcmp(line, "show counters") == 0) {
        show_counters(s);
    } else if (strcmp(line, "show version") == 0) {
        show_version(s);
    } else if (strcmp(line, "stop") == 0) {
        s->done = true;
    } else {
        problem = "unknown request; there are peer, peers, forget, show, take-over, stop";
    }
    return problem;
}

/* -- clients ------------------------------------------------------------------------------------------------------- */

static void drop(struct client *c) {
    close(c->sock);
    free(c->staged);
    *c = (struct client){.sock = -1};
}

static void hand_over(struct server *s) {
    const char *problem;
    np_stop_workers(s->f);
    problem = np_hand_over(s->f, s->asking->sock);
    if (problem == NULL) {
        s->done = true;
        return;
    }
    fprintf(stderr, "nodeplane-udp: %s\n", problem);
    if (np_start_workers(s->f) != NULL) {
        atomic_store(&s->f->failure, EAGAIN);
    }
}

static void serve(struct server *s, struct client *c) {
    ssize_t length = recv(c->sock, s->request, MESSAGE - 1, MSG_DONTWAIT);
    const char *problem = NULL;
    bool changed = false;
    if (length <= 0) {
        drop(c);
        return;
    }
    s->request[length] = 0;
    s->asking = c;
    s->length = 0;
    if (strcmp(s->request, "take-over\n") == 0) {
        hand_over(s);
        return;
    }
    for (char *rest = s->request, *line; problem == NULL && (line = strsep(&rest, "\n")) != NULL;) {
        problem = *line ? obey(s, line, &changed) : NULL;
    }
    if (changed) { /* also what stood before a line that was refused */
        const char *unpublished = publish(s);
        problem = problem ? problem : unpublished;
    }
    if (problem != NULL) {
        answer(s, "error %s\n", problem);
    } else {
        answer(s, "ok\n");
    }
    deliver(s);
}

static void welcome(struct server *s, int listener) {
    int sock = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    for (int i = 0; sock >= 0 && i < CLIENTS; i++) {
        if (s->clients[i].sock < 0) {
            s->clients[i].sock = sock;
            return;
        }
    }
    if (sock >= 0) {
        close(sock);
    }
}

/* Listens where an older process may still do so: from one moment to the next it is us. */
static int listen_at(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int length = snprintf(address.sun_path, sizeof address.sun_path, "%s.%d", path, (int)getpid());
    if (length < 0 || (size_t)length >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    mode_t before = umask(0077);
    bool there = sock >= 0 && bind(sock, (struct sockaddr *)&address, sizeof address) == 0 && listen(sock, 16) == 0;
    umask(before);
    if (there && rename(address.sun_path, path) == 0) {
        return sock;
    }
    int error = errno;
    unlink(address.sun_path);
    if (sock >= 0) {
        close(sock);
    }
    errno = error;
    return -1;
}

static int end_of(const struct np_forwarder *f) {
    int failure = atomic_load(&f->failure);
    if (failure == 0) {
        return 0;
    }
    fprintf(stderr, "nodeplane-udp: %s: %s\n", f->tun, failure == EBADFD ? "the link is gone" : strerror(failure));
    return 1;
}

int np_serve(struct np_forwarder *f, const char *path, struct np_peer *peers, uint32_t count) {
    static struct server s;
    sigset_t signals;
    const char *problem;
    s.f = f;
    s.peers = peers;
    s.count = count;
    for (int i = 0; i < CLIENTS; i++) {
        s.clients[i].sock = -1;
    }
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, NULL); /* workers inherit it: signals come here alone */
    int signal_fd = signalfd(-1, &signals, SFD_CLOEXEC);
    struct np_table *table = np_table_make(peers, count);
    if (table != NULL) {
        np_find_own(f, table);
    }
    atomic_store(&f->table, table);
    problem = table == NULL ? "no memory for the table" : np_start_workers(f);
    int listener = problem == NULL ? listen_at(path) : -1;
    if (listener < 0) {
        fprintf(stderr, "nodeplane-udp: %s: %s\n", path, problem ? problem : strerror(errno));
        return 1;
    }
    while (!s.done && atomic_load(&f->failure) == 0) {
        struct pollfd fds[CLIENTS + 3] = {{signal_fd, POLLIN, 0}, {listener, POLLIN, 0}, {f->wake, POLLIN, 0}};
        for (int i = 0; i < CLIENTS; i++) {
            fds[i + 3] = (struct pollfd){s.clients[i].sock, POLLIN, 0};
        }
        if (poll(fds, CLIENTS + 3, -1) < 0 && errno != EINTR) {
            break;
        }
        s.done = s.done || fds[0].revents != 0;
        for (int i = 0; i < CLIENTS && !s.done; i++) {
            if (fds[i + 3].revents != 0) {
                serve(&s, &s.clients[i]);
            }
        }
        if (fds[1].revents != 0) {
            welcome(&s, listener);
        }
    }
    return end_of(f);
}
