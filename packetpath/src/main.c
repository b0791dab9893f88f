/* nodeplane-udp: the UDP backend's data path, a process of its own so that packets flow while the agent is away.
 *
 *   nodeplane-udp --tun flannel0 --port 8285 --local 192.168.1.1 [--local fd00::1] --control PATH [--queues N] [--take-over]
 *
 * Exit code 0: ended as asked; 1: failed, one line on stderr says why; 2: wrong usage.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <getopt.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "forwarder.h"

static struct np_forwarder forwarder;

static int usage(const char *problem, const char *value) {
    fprintf(stderr, "nodeplane-udp: %s%s%s\n", problem, value ? ": " : "", value ? value : "");
    return 2;
}

static bool number(const char *text, long most, long *value) {
    char *end;
    *value = strtol(text, &end, 10);
    return *text != 0 && *end == 0 && *value >= 1 && *value <= most;
}

static bool local_address(struct np_forwarder *f, const char *text) {
    int side = strchr(text, ':') != NULL;
    struct sockaddr_in *in = (struct sockaddr_in *)&f->local[0];
    struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)&f->local[1];
    f->local[side].ss_family = side ? AF_INET6 : AF_INET;
    f->has_local[side] = true;
    return inet_pton(side ? AF_INET6 : AF_INET, text, side ? (void *)&in6->sin6_addr : (void *)&in->sin_addr) == 1;
}

int main(int argc, char **argv) {
    static const struct option options[] = {
        {"tun", required_argument, NULL, 't'},     {"port", required_argument, NULL, 'p'},   {"local", required_argument, NULL, 'l'},
        {"control", required_argument, NULL, 'c'}, {"queues", required_argument, NULL, 'q'}, {"take-over", no_argument, NULL, 'o'},
        {"version", no_argument, NULL, 'v'},       {NULL, 0, NULL, 0},
    };
    struct np_forwarder *f = &forwarder;
    const char *control = NULL, *problem;
    struct np_peer *peers = NULL;
    uint32_t count = 0;
    bool take_over = false;
    long value, cores = sysconf(_SC_NPROCESSORS_ONLN);
    f->port = 8285;
    f->queues = cores < 1 ? 1 : cores > 8 ? 8 : (int)cores;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (option) {
        case 't':
            if (strlen(optarg) == 0 || strlen(optarg) >= sizeof f->tun) {
                return usage("--tun: must be a link's name of at most 15 characters", optarg);
            }
            strcpy(f->tun, optarg);
            break;
        case 'p':
            if (!number(optarg, 65535, &value)) {
                return usage("--port: must be between 1 and 65535", optarg);
            }
            f->port = (uint16_t)value;
            break;
        case 'l':
            if (!local_address(f, optarg)) {
                return usage("--local: must be an IP address", optarg);
            }
            break;
        case 'c':
            control = optarg;
            break;
        case 'q':
            if (!number(optarg, NP_MAX_QUEUES, &value)) {
                return usage("--queues: must be between 1 and 32", optarg);
            }
            f->queues = (int)value;
            break;
        case 'o':
            take_over = true;
            break;
        case 'v':
            printf("nodeplane-udp %s\n", NP_VERSION);
            return 0;
        default:
            return 2;
        }
    }
    if (optind < argc || control == NULL || f->tun[0] == 0 || !(f->has_local[0] || f->has_local[1])) {
        return usage("usage: nodeplane-udp --tun LINK --port N --local IP [--local IP6] --control PATH [--queues N] [--take-over]", NULL);
    }
    f->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    problem = f->wake < 0 ? "eventfd failed" : np_open(f, take_over ? control : NULL, &peers, &count);
    if (problem != NULL) {
        fprintf(stderr, "nodeplane-udp: %s\n", problem);
        return 1;
    }
    return np_serve(f, control, peers, count);
}
