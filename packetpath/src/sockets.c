/* What packets go through: queues of the TUN and UDP sockets, opened anew or taken over from the process that is replaced.
 *
 *   old process --SCM_RIGHTS: queues, sockets that receive--> new process       packets that wait in them wait on
 *
 * Sockets that send are opened anew each time: nothing waits in them. Sources: tuntap.rst, if_tun.h, unix(7).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <netinet/udp.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "forwarder.h"

#ifndef UDP_GRO
#define UDP_GRO 104
#endif
#ifndef UDP_NO_CHECK6_RX
#define UDP_NO_CHECK6_RX 102
#endif
#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif
#define BUFFER (8 << 20)
#define WAITING 2000 /* packets in a queue of the TUN: a worker that waits 10 ms for a core loses none of 200,000 a second */
#define MAX_DESCRIPTORS (3 * NP_MAX_QUEUES)

static char words[512];

static const char *say(const char *what, const char *about) {
    snprintf(words, sizeof words, "%s: %s: %s", about, what, strerror(errno));
    return words;
}

static const char *open_queue(struct np_forwarder *f, int *queue) {
    struct ifreq request = {0};
    *queue = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (*queue < 0) {
        return say("open", "/dev/net/tun");
    }
    memcpy(request.ifr_name, f->tun, sizeof f->tun);
    request.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
    if (ioctl(*queue, TUNSETIFF, &request) < 0) {
        const char *problem = say("attach a queue", f->tun);
        close(*queue);
        *queue = -1;
        return problem;
    }
    return NULL;
}

/* Says which superpackets we can take; the kernel then gives such, and takes such. */
static const char *set_offloads(struct np_forwarder *f, int queue) {
    unsigned int basic = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6;
    f->uso = ioctl(queue, TUNSETOFFLOAD, basic | TUN_F_USO4 | TUN_F_USO6) == 0;
    if (!f->uso && ioctl(queue, TUNSETOFFLOAD, basic) < 0) {
        return say("set offloads", f->tun);
    }
    return NULL;
}

/* Lets more packets wait than the 500 of a new TUN. One that may not be changed stays as it is. */
static void lengthen_queues(const struct np_forwarder *f) {
    struct ifreq request = {0};
    int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    memcpy(request.ifr_name, f->tun, sizeof f->tun);
    if (sock >= 0 && ioctl(sock, SIOCGIFTXQLEN, &request) == 0 && request.ifr_qlen < WAITING) {
        request.ifr_qlen = WAITING;
        ioctl(sock, SIOCSIFTXQLEN, &request);
    }
    if (sock >= 0) {
        close(sock);
    }
}

static const char *open_socket(const struct sockaddr_storage *local, uint16_t port, bool receives, int *sock) {
    struct sockaddr_storage address = *local;
    int one = 1, size = BUFFER, never = IP_PMTUDISC_DONT;
    bool six = local->ss_family == AF_INET6;
    socklen_t length = six ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in);
    char text[INET6_ADDRSTRLEN] = "";
    *sock = socket(local->ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (*sock < 0) {
        return say("socket", six ? "IPv6" : "IPv4");
    }
    if (six) {
        ((struct sockaddr_in6 *)&address)->sin6_port = htons(port);
        setsockopt(*sock, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
        setsockopt(*sock, SOL_UDP, UDP_NO_CHECK6_RX, &one, sizeof one);
    } else {
        ((struct sockaddr_in *)&address)->sin_port = htons(port);
        /* A path with a smaller MTU fragments; with DF it would lose packets, and pods would never hear of it. */
        setsockopt(*sock, IPPROTO_IP, IP_MTU_DISCOVER, &never, sizeof never);
    }
    int what = receives ? SO_RCVBUFFORCE : SO_SNDBUFFORCE;
    if (setsockopt(*sock, SOL_SOCKET, what, &size, sizeof size) < 0) {
        setsockopt(*sock, SOL_SOCKET, receives ? SO_RCVBUF : SO_SNDBUF, &size, sizeof size);
    }
    if (receives) {
        setsockopt(*sock, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one);
        setsockopt(*sock, SOL_UDP, UDP_GRO, &one, sizeof one);
    }
    if (bind(*sock, (struct sockaddr *)&address, length) < 0) {
        inet_ntop(local->ss_family, six ? (void *)&((struct sockaddr_in6 *)&address)->sin6_addr : (void *)&((struct sockaddr_in *)&address)->sin_addr, text, sizeof text);
        char about[INET6_ADDRSTRLEN + 16];
        snprintf(about, sizeof about, "%s port %u", text, port);
        const char *problem = say("bind", about);
        close(*sock);
        *sock = -1;
        return problem;
    }
    return NULL;
}

/* -- taking over --------------------------------------------------------------------------------------------------- */

static int connect_to(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {2, 0};
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address.sun_path, path);
    int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (sock >= 0 && connect(sock, (struct sockaddr *)&address, sizeof address) < 0) {
        close(sock);
        return -1;
    }
    if (sock >= 0) {
        setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    }
    return sock;
}

/* Reads the old process' peers into a new array. */
static const char *take_peers(int sock, struct np_peer **peers, uint32_t *count) {
    static char message[1 << 16];
    bool done = false;
    if (send(sock, "show peers\n", 11, 0) < 0) {
        return say("ask for peers", "take over");
    }
    while (!done) {
        ssize_t length = recv(sock, message, sizeof message - 1, 0);
        if (length <= 0) {
            return say("read peers", "take over");
        }
        message[length] = 0;
        for (char *rest = message, *line; (line = strsep(&rest, "\n")) != NULL && !done;) {
            const char *problem = NULL;
            if (strncmp(line, "peer ", 5) == 0) {
                *peers = realloc(*peers, (*count + 1) * sizeof **peers);
                if (*peers == NULL || !np_parse_peer(line + 5, &(*peers)[*count], &problem)) {
                    return problem ? problem : "no memory";
                }
                (*count)++;
            }
            done = strcmp(line, "ok") == 0;
            if (strncmp(line, "error", 5) == 0) {
                return "take over: the old process refuses to show its peers";
            }
        }
    }
    return NULL;
}

/* Asks the old process for its descriptors; keeps the queues if they are of our TUN, and the sockets of our addresses and port. */
static const char *take_descriptors(struct np_forwarder *f, int sock, int *sockets[2], int taken[2]) {
    static char message[1 << 16];
    union {
        char bytes[CMSG_SPACE(MAX_DESCRIPTORS * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov = {message, sizeof message - 1};
    struct msghdr header = {NULL, 0, &iov, 1, control.bytes, sizeof control.bytes, 0};
    if (send(sock, "take-over\n", 10, 0) < 0) {
        return say("ask for descriptors", "take over");
    }
    ssize_t length = recvmsg(sock, &header, MSG_CMSG_CLOEXEC);
    if (length <= 0) {
        return say("receive descriptors", "take over");
    }
    message[length] = 0;
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&header);
    if (cmsg == NULL || cmsg->cmsg_type != SCM_RIGHTS) {
        return "take over: the old process hands over nothing";
    }
    int n = (int)((cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int)), descriptors[MAX_DESCRIPTORS];
    memcpy(descriptors, CMSG_DATA(cmsg), (size_t)n * sizeof(int));
    char *rest = message, *line;
    for (int i = 0; i < n && (line = strsep(&rest, "\n")) != NULL; i++) {
        struct sockaddr_storage bound = {0};
        socklen_t size = sizeof bound;
        bool kept = false;
        if (strncmp(line, "tun", 3) == 0) {
            struct ifreq request = {0};
            bool ours = ioctl(descriptors[i], TUNGETIFF, &request) == 0 && strncmp(request.ifr_name, f->tun, IFNAMSIZ) == 0;
            if (ours && f->workers[f->queues].queue < 0 && f->queues < NP_MAX_QUEUES) {
                fcntl(descriptors[i], F_SETFL, O_NONBLOCK);
                f->workers[f->queues++].queue = descriptors[i];
                kept = true;
            }
        } else if (getsockname(descriptors[i], (struct sockaddr *)&bound, &size) == 0) {
            int side = bound.ss_family == AF_INET6;
            struct sockaddr_in *in = (struct sockaddr_in *)&bound, *own = (struct sockaddr_in *)&f->local[side];
            struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)&bound, *own6 = (struct sockaddr_in6 *)&f->local[side];
            bool same = side ? memcmp(&in6->sin6_addr, &own6->sin6_addr, 16) == 0 : in->sin_addr.s_addr == own->sin_addr.s_addr;
            uint16_t port = ntohs(side ? in6->sin6_port : in->sin_port);
            if (f->has_local[side] && same && port == f->port && taken[side] < NP_MAX_QUEUES) {
                sockets[side][taken[side]++] = descriptors[i];
                kept = true;
            }
        }
        if (!kept) {
            close(descriptors[i]);
        }
    }
    return NULL;
}

const char *np_hand_over(struct np_forwarder *f, int client) {
    char lines[MAX_DESCRIPTORS * 8 + 8] = "";
    int descriptors[MAX_DESCRIPTORS], n = 0;
    union {
        char bytes[CMSG_SPACE(MAX_DESCRIPTORS * sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    for (int i = 0; i < f->queues; i++) {
        descriptors[n++] = f->workers[i].queue;
        strcat(lines, "tun\n");
        for (int side = 0; side < 2; side++) {
            if (f->workers[i].sockets[side] >= 0) {
                descriptors[n++] = f->workers[i].sockets[side];
                strcat(lines, "udp\n");
            }
        }
    }
    strcat(lines, "ok\n");
    struct iovec iov = {lines, strlen(lines)};
    struct msghdr header = {NULL, 0, &iov, 1, control.bytes, CMSG_SPACE((size_t)n * sizeof(int)), 0};
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&header);
    cmsg->cmsg_level = SOL_SOCKET;
    cmsg->cmsg_type = SCM_RIGHTS;
    cmsg->cmsg_len = CMSG_LEN((size_t)n * sizeof(int));
    memcpy(CMSG_DATA(cmsg), descriptors, (size_t)n * sizeof(int));
    return sendmsg(client, &header, 0) < 0 ? say("send descriptors", "hand over") : NULL;
}

/* -- opening ------------------------------------------------------------------------------------------------------- */

/* Tells a table the TUN's addresses; a link-local one would mean nothing to a pod. */
void np_find_own(const struct np_forwarder *f, struct np_table *table) {
    struct ifaddrs *all, *one;
    if (getifaddrs(&all) < 0) {
        return;
    }
    for (one = all; one != NULL; one = one->ifa_next) {
        if (one->ifa_addr == NULL || strcmp(one->ifa_name, f->tun) != 0) {
            continue;
        }
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)one->ifa_addr;
        if (one->ifa_addr->sa_family == AF_INET) {
            table->own[0].family = 4;
            memcpy(table->own[0].bytes, &((const struct sockaddr_in *)one->ifa_addr)->sin_addr, 4);
        } else if (one->ifa_addr->sa_family == AF_INET6 && !IN6_IS_ADDR_LINKLOCAL(&in6->sin6_addr)) {
            table->own[1].family = 6;
            memcpy(table->own[1].bytes, &in6->sin6_addr, 16);
        }
    }
    freeifaddrs(all);
}

const char *np_open(struct np_forwarder *f, const char *take_over_from, struct np_peer **peers, uint32_t *count) {
    int four[NP_MAX_QUEUES], six[NP_MAX_QUEUES], *sockets[2] = {four, six}, taken[2] = {0, 0}, wanted = f->queues;
    const char *problem;
    for (int i = 0; i < NP_MAX_QUEUES; i++) {
        f->workers[i].queue = f->workers[i].sockets[0] = f->workers[i].sockets[1] = -1;
    }
    f->queues = 0;
    if (take_over_from != NULL) {
        int old = connect_to(take_over_from);
        if (old < 0) {
            return say("connect", take_over_from);
        }
        problem = take_peers(old, peers, count);
        problem = problem ? problem : take_descriptors(f, old, sockets, taken);
        close(old);
        if (problem != NULL) {
            return problem;
        }
    }
    while (f->queues > wanted) {
        close(f->workers[--f->queues].queue);
    }
    for (; f->queues < wanted; f->queues++) {
        if ((problem = open_queue(f, &f->workers[f->queues].queue)) != NULL) {
            return problem;
        }
    }
    if ((problem = set_offloads(f, f->workers[0].queue)) != NULL) {
        return problem;
    }
    for (int side = 0; side < 2; side++) {
        for (int i = 0; i < f->queues && f->has_local[side]; i++) {
            if (i < taken[side]) {
                f->workers[i].sockets[side] = sockets[side][i];
            } else if ((problem = open_socket(&f->local[side], f->port, true, &f->workers[i].sockets[side])) != NULL) {
                return problem;
            }
        }
        for (int i = f->queues; i < taken[side]; i++) {
            close(sockets[side][i]);
        }
        for (int i = 0; i < NP_SPREAD; i++) {
            f->send[side][i] = -1;
            if (f->has_local[side] && (problem = open_socket(&f->local[side], 0, false, &f->send[side][i])) != NULL) {
                return problem;
            }
        }
    }
    /* IPPROTO_RAW: whole packets are sent, nothing is received. One that may not be opened costs pods their ICMP errors, no more. */
    f->raw[0] = socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);
    f->raw[1] = socket(AF_INET6, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);
    lengthen_queues(f);
    return NULL;
}
