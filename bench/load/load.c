/* Traffic between two pods, and what became of it: one TCP stream, a flood of small UDP packets, or one packet to and fro.
 *
 *     load stream-in PORT                   load stream-out ADDRESS PORT MILLISECONDS
 *     load flood-in PORT                    load flood-out  ADDRESS PORT MILLISECONDS PAYLOAD
 *     load echo PORT                        load ping       ADDRESS PORT MILLISECONDS PAYLOAD
 *
 * Those that listen print "ready" once they can be sent to. Each ends with one line of JSON; "cpu" is the nanoseconds that the
 * process took, with all that the kernel did on its time. A stream ends with its connection, a flood when nothing has come for
 * a while; echo ends when its input does, or after LONGEST seconds without a packet. PAYLOAD is in bytes of UDP data.
 *
 * What is sent costs as little as possible: the same buffer again and again, 64 datagrams a system call. The receiver of a flood
 * looks for packets now and then: if it waited for them it would be woken for each, on another CPU, which costs more than a path
 * does, and is no part of it. So a difference between two runs is the path's. IPv4. Exit status 0 done, 1 with a line on stderr, 2 wrong usage.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    BUFFER = 128 << 10,
    BATCH = 64,
    MOST_PAYLOAD = 65000,
    LONGEST = 10,         /* seconds that anything is waited for */
    LOOK = 500,           /* microseconds after which the receiver of a flood looks again */
    QUIET = 150,          /* milliseconds without a packet after which a flood is over */
    ROUNDS = 1 << 20,     /* round trips that a ping can remember */
};

static char buffer[BUFFER];

static void die(const char *format, ...)
{
    int code = errno;
    va_list args;
    va_start(args, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, ": %s\n", strerror(code));
    exit(1);
}

static uint64_t now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t cpu(void)
{
    return now(CLOCK_PROCESS_CPUTIME_ID);
}

static uint64_t wall(void)
{
    return now(CLOCK_MONOTONIC);
}

static int number(const char *text, int most)
{
    char *end;
    long value = strtol(text, &end, 10);
    if (!*text || *end || value < 1 || value > most) {
        fprintf(stderr, "load: must be a number from 1 to %d, is %s\n", most, text);
        exit(2);
    }
    return (int)value;
}

static struct sockaddr_in address_of(const char *text, const char *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)number(port, 65535))};
    if (inet_pton(AF_INET, text, &address.sin_addr) != 1) {
        fprintf(stderr, "load: must be an IPv4 address, is %s\n", text);
        exit(2);
    }
    return address;
}

static int listening(int kind, const char *port)
{
    struct sockaddr_in address = address_of("0.0.0.0", port);
    int sock = socket(AF_INET, kind | SOCK_CLOEXEC, 0), one = 1, room = 4 << 20;
    if (sock < 0)
        die("socket");
    setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (kind == SOCK_DGRAM && setsockopt(sock, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room))
        setsockopt(sock, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
    if (bind(sock, (struct sockaddr *)&address, sizeof address))
        die("bind to port %s", port);
    if (kind == SOCK_STREAM && listen(sock, 1))
        die("listen");
    puts("ready");
    fflush(stdout);
    return sock;
}

static int connected(int kind, const char *to, const char *port)
{
    struct sockaddr_in address = address_of(to, port);
    struct timeval longest = {.tv_sec = LONGEST};
    int sock = socket(AF_INET, kind | SOCK_CLOEXEC, 0);
    if (sock < 0)
        die("socket");
    setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &longest, sizeof longest);
    if (connect(sock, (struct sockaddr *)&address, sizeof address))
        die("connect to %s port %s", to, port);
    return sock;
}

static void patience(int sock, int milliseconds)
{
    struct timeval time = {.tv_sec = milliseconds / 1000, .tv_usec = milliseconds % 1000 * 1000};
    if (setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time))
        die("SO_RCVTIMEO");
}

static void stream_in(const char *port)
{
    int server = listening(SOCK_STREAM, port);
    struct pollfd waiting = {.fd = server, .events = POLLIN};
    if (poll(&waiting, 1, LONGEST * 1000) != 1) {
        errno = ETIMEDOUT;
        die("wait for a connection");
    }
    int sock = accept(server, NULL, NULL);
    if (sock < 0)
        die("accept");
    patience(sock, LONGEST * 1000);
    uint64_t bytes = 0, first = 0;
    ssize_t got;
    while ((got = recv(sock, buffer, sizeof buffer, 0)) > 0) {
        if (!first)
            first = wall();
        bytes += (uint64_t)got;
    }
    if (got < 0)
        die("receive");
    printf("{\"bytes\": %lu, \"ns\": %lu, \"cpu\": %lu}\n", bytes, wall() - first, cpu());
}

static void stream_out(const char *to, const char *port, int milliseconds)
{
    int sock = connected(SOCK_STREAM, to, port);
    uint64_t end = wall() + (uint64_t)milliseconds * 1000000u, bytes = 0;
    while (wall() < end) {
        ssize_t sent = send(sock, buffer, sizeof buffer, MSG_NOSIGNAL);
        if (sent < 0)
            die("send");
        bytes += (uint64_t)sent;
    }
    struct tcp_info info = {0};
    socklen_t length = sizeof info;
    getsockopt(sock, IPPROTO_TCP, TCP_INFO, &info, &length);
    printf("{\"bytes\": %lu, \"retransmits\": %u, \"cpu\": %lu}\n", bytes, info.tcpi_total_retrans, cpu());
}

static void fill(struct mmsghdr *messages, struct iovec *pieces, int payload, char *room)
{
    for (int i = 0; i < BATCH; i++) {
        pieces[i] = (struct iovec){room ? room + i * payload : buffer, (size_t)payload};
        messages[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = &pieces[i], .msg_iovlen = 1}};
    }
}

static void flood_in(const char *port)
{
    static char room[BATCH * 2048];
    struct mmsghdr messages[BATCH];
    struct iovec pieces[BATCH];
    int sock = listening(SOCK_DGRAM, port);
    fill(messages, pieces, 2048, room);
    uint64_t packets = 0, first = 0, last = wall();
    while (wall() - last < (first ? QUIET * 1000000ull : LONGEST * 1000000000ull)) {
        int got = recvmmsg(sock, messages, BATCH, MSG_DONTWAIT, NULL);
        if (got > 0) {
            last = wall();
            first = first ? first : last;
            packets += (uint64_t)got;
        } else if (errno == EAGAIN)
            nanosleep(&(struct timespec){.tv_nsec = LOOK * 1000}, NULL);
        else
            die("receive");
    }
    printf("{\"packets\": %lu, \"ns\": %lu, \"cpu\": %lu}\n", packets, last - first, cpu());
}

static void flood_out(const char *to, const char *port, int milliseconds, int payload)
{
    struct mmsghdr messages[BATCH];
    struct iovec pieces[BATCH];
    int sock = connected(SOCK_DGRAM, to, port);
    fill(messages, pieces, payload, NULL);
    uint64_t end = wall() + (uint64_t)milliseconds * 1000000u, packets = 0;
    while (wall() < end) {
        int sent = sendmmsg(sock, messages, BATCH, 0);
        if (sent > 0)
            packets += (uint64_t)sent;
        else if (errno != ENOBUFS && errno != EAGAIN)
            die("send");
    }
    printf("{\"packets\": %lu, \"cpu\": %lu}\n", packets, cpu());
}

static void echo(const char *port)
{
    int sock = listening(SOCK_DGRAM, port);
    struct pollfd waiting[] = {{.fd = sock, .events = POLLIN}, {.fd = 0, .events = POLLIN}};
    uint64_t packets = 0;
    while (poll(waiting, 2, LONGEST * 1000) > 0 && !waiting[1].revents) {
        struct sockaddr_in from;
        socklen_t length = sizeof from;
        ssize_t got = recvfrom(sock, buffer, sizeof buffer, MSG_DONTWAIT, (struct sockaddr *)&from, &length);
        if (got >= 0 && sendto(sock, buffer, (size_t)got, 0, (struct sockaddr *)&from, length) == got)
            packets++;
    }
    printf("{\"packets\": %lu, \"cpu\": %lu}\n", packets, cpu());
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void ping(const char *to, const char *port, int milliseconds, int payload)
{
    static uint32_t took[ROUNDS];
    int sock = connected(SOCK_DGRAM, to, port), discover = IP_PMTUDISC_DO;
    uint32_t rounds = 0, lost = 0;
    uint64_t begin = wall(), end = begin + (uint64_t)milliseconds * 1000000u;
    if (setsockopt(sock, IPPROTO_IP, IP_MTU_DISCOVER, &discover, sizeof discover))
        die("IP_MTU_DISCOVER");
    patience(sock, 100);
    for (uint32_t i = 0; rounds < ROUNDS && (begin = wall()) < end; i++) {
        memcpy(buffer, &i, payload < 4 ? (size_t)payload : 4);
        if (send(sock, buffer, (size_t)payload, 0) != payload)
            die("send %d bytes of payload unfragmented", payload);
        ssize_t got;
        uint32_t answered;
        do { /* an answer to an earlier one, that was given up, is none */
            got = recv(sock, &answered, sizeof answered, 0);
        } while (got > 0 && payload >= 4 && answered != i);
        if (got > 0)
            took[rounds++] = (uint32_t)(wall() - begin);
        else
            lost++;
    }
    qsort(took, rounds, sizeof *took, by_value);
    printf("{\"rounds\": %u, \"lost\": %u, \"median\": %u, \"p99\": %u, \"cpu\": %lu}\n", rounds, lost,
           rounds ? took[rounds / 2] : 0, rounds ? took[(uint64_t)rounds * 99 / 100] : 0, cpu());
}

int main(int argc, char **argv)
{
    const char *what = argc > 2 ? argv[1] : "";
    if (argc == 3 && !strcmp(what, "stream-in"))
        stream_in(argv[2]);
    else if (argc == 3 && !strcmp(what, "flood-in"))
        flood_in(argv[2]);
    else if (argc == 3 && !strcmp(what, "echo"))
        echo(argv[2]);
    else if (argc == 5 && !strcmp(what, "stream-out"))
        stream_out(argv[2], argv[3], number(argv[4], 60000));
    else if (argc == 6 && !strcmp(what, "flood-out"))
        flood_out(argv[2], argv[3], number(argv[4], 60000), number(argv[5], 2048));
    else if (argc == 6 && !strcmp(what, "ping"))
        ping(argv[2], argv[3], number(argv[4], 60000), number(argv[5], MOST_PAYLOAD));
    else {
        fputs("usage: load stream-in|flood-in|echo PORT | stream-out ADDRESS PORT MS | flood-out|ping ADDRESS PORT MS PAYLOAD\n",
              stderr);
        return 2;
    }
    return 0;
}
