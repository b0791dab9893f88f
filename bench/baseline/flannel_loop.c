/* The plain loop that the forwarder is compared with: one thread, one packet for each system call, as flannel's udp backend works.
 *
 *   flannel_loop TUN PORT LOCAL [PREFIX/LENGTH PEER]...       until SIGTERM
 *
 *   TUN --read one--> routes, one after the other --> TTL - 1 --> sendto --> UDP PORT of the peer
 *   UDP --recv one--> TTL - 1 --> write one --> TUN
 *
 * Makes the TUN itself, without virtio headers, so packets are of the link's MTU; it is gone with the process. Written from a
 * description of what flannel does (its pkg/backend/udp), sharing nothing with it or with packetpath/.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

struct route {
    uint32_t network, mask;
    struct sockaddr_in hop;
};

static struct route routes[4096];
static int route_count;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static int open_tun(const char *name) {
    struct ifreq request = {0};
    int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    request.ifr_flags = IFF_TUN | IFF_NO_PI;
    if (tun < 0 || ioctl(tun, TUNSETIFF, &request) < 0) {
        fail(name);
    }
    return tun;
}

static int open_socket(const char *local, int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int sock = socket(AF_INET, SOCK_DGRAM, 0);
    if (inet_pton(AF_INET, local, &address.sin_addr) != 1 || sock < 0 || bind(sock, (struct sockaddr *)&address, sizeof address) < 0) {
        fail(local);
    }
    return sock;
}

static void add_route(char *prefix, const char *peer, int port) {
    struct route *route = &routes[route_count++];
    char *slash = strchr(prefix, '/');
    int length = slash ? atoi(slash + 1) : 32;
    if (slash) {
        *slash = 0;
    }
    route->mask = length ? htonl(~0u << (32 - length)) : 0;
    route->hop = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, prefix, &route->network) != 1 || inet_pton(AF_INET, peer, &route->hop.sin_addr) != 1) {
        fail(prefix);
    }
}

static struct route *find(uint32_t destination) {
    for (int i = 0; i < route_count; i++) {
        if ((destination & routes[i].mask) == routes[i].network) {
            struct route found = routes[i]; /* the one in use is found first next time */
            routes[i] = routes[0];
            routes[0] = found;
            return &routes[0];
        }
    }
    return NULL;
}

/* Takes one hop; 0: it was the last. */
static int hop(uint8_t *packet) {
    if (packet[8] <= 1) {
        return 0;
    }
    packet[8]--;
    uint32_t sum = (uint32_t)(packet[10] << 8 | packet[11]) + 0x100;
    sum += sum >> 16;
    packet[10] = (uint8_t)(sum >> 8);
    packet[11] = (uint8_t)sum;
    return 1;
}

static int to_peer(int tun, int sock, uint8_t *buffer, size_t size) {
    ssize_t length = read(tun, buffer, size);
    if (length < 20) {
        return length >= 0;
    }
    uint32_t destination;
    memcpy(&destination, buffer + 16, 4);
    struct route *route = find(destination);
    if (route != NULL && hop(buffer)) {
        sendto(sock, buffer, (size_t)length, 0, (struct sockaddr *)&route->hop, sizeof route->hop);
    }
    return 1;
}

static int to_pod(int tun, int sock, uint8_t *buffer, size_t size) {
    ssize_t length = recv(sock, buffer, size, MSG_DONTWAIT);
    if (length < 20) {
        return length >= 0;
    }
    if (hop(buffer) && write(tun, buffer, (size_t)length) < 0 && errno == EBADFD) {
        exit(1);
    }
    return 1;
}

int main(int argc, char **argv) {
    static uint8_t buffer[65536];
    if (argc < 4) {
        fprintf(stderr, "usage: flannel_loop TUN PORT LOCAL [PREFIX/LENGTH PEER]...\n");
        return 2;
    }
    int port = atoi(argv[2]), tun = open_tun(argv[1]), sock = open_socket(argv[3], port);
    for (int i = 4; i + 1 < argc && route_count < 4096; i += 2) {
        add_route(argv[i], argv[i + 1], port);
    }
    puts("ready");
    fflush(stdout);
    for (;;) {
        struct pollfd fds[2] = {{tun, POLLIN, 0}, {sock, POLLIN, 0}};
        poll(fds, 2, -1);
        int any = 1;
        while (any) {
            any = to_peer(tun, sock, buffer, sizeof buffer);
            any |= to_pod(tun, sock, buffer, sizeof buffer);
        }
    }
}
