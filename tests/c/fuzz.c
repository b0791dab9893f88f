/* Packets that nobody should send, through everything that touches packets, built with AddressSanitizer and UBSan.
 *
 *   fuzz SECONDS [SEED]      every buffer is as long as its packet and no longer: a byte too far is a report
 *
 * What holds for any packet is checked on the way: a packet that goes has one hop less and its checksum still right; what is cut
 * and joined again is what it was.
 */
#include <stdio.h>
#include <time.h>

#include "api.c"

static uint64_t state = 88172645463325252u;
static uint32_t number(uint32_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return below ? (uint32_t)(state >> 16) % below : 0;
}

static void require(bool holds, const char *what) {
    if (!holds) {
        fprintf(stderr, "does not hold: %s\n", what);
        abort();
    }
}

static uint32_t seed_packet(uint8_t *out) {
    bool six = number(3) == 0;
    uint32_t options = number(4) ? 0 : 4 * number(11), header = six ? 40 : 20 + (number(4) ? 0 : options);
    static const uint8_t protocols[] = {6, 6, 6, 17, 17, 1, 58, 44, 0, 132};
    uint8_t protocol = protocols[number(sizeof protocols)];
    uint32_t transport = protocol == 6 ? 20 + 4 * number(6) : 8, payload = number(4) ? number(200) : number(4000);
    uint32_t total = header + transport + payload;
    for (uint32_t i = 0; i < total; i++) {
        out[i] = (uint8_t)number(256);
    }
    if (six) {
        out[0] = 0x60;
        np_put16(out + 4, total - 40);
        out[6] = protocol;
        out[7] = (uint8_t)(number(8) ? 64 : number(3));
        memcpy(out + 8, "\xfd\0\2\x44\0\0\0", 7);
        out[15] = (uint8_t)number(4);
        memcpy(out + 24, "\xfd\0\2\x44\0\0\0", 7);
        out[31] = (uint8_t)number(4);
    } else {
        out[0] = (uint8_t)(0x40 | header / 4);
        np_put16(out + 2, total);
        np_put16(out + 6, number(6) ? 0x4000 : number(65536));
        out[8] = (uint8_t)(number(8) ? 64 : number(3));
        out[9] = protocol;
        memcpy(out + 12, "\x0a\xf4", 2);
        out[14] = (uint8_t)number(4);
        memcpy(out + 16, "\x0a\xf4", 2);
        out[18] = (uint8_t)number(4);
        np_header_checksum(out, header);
    }
    if (protocol == 6) {
        out[header + 12] = (uint8_t)(transport / 4 << 4);
        out[header + 13] = 0x10;
    } else if (protocol == 17) {
        np_put16(out + header + 4, 8 + payload);
    }
    struct np_ip ip;
    if (np_parse(out, total, &ip) && (protocol == 6 || protocol == 17)) {
        uint32_t at = header + (protocol == 6 ? 16 : 6);
        np_put16(out + at, 0);
        uint16_t check = (uint16_t)~np_fold(np_sum(out + header, total - header, np_pseudo(out, ip.version, protocol, total - header)));
        np_store_sum(out + at, check ? check : 0xffff);
    }
    return total;
}

static uint32_t mutate(uint8_t *packet, uint32_t length) {
    for (uint32_t i = number(2) ? 0 : number(8); i > 0 && length > 0; i--) {
        packet[number(number(2) ? (length < 60 ? length : 60) : length)] = (uint8_t)number(256);
    }
    return number(6) ? length : number(length + 1);
}

static bool header_right(const uint8_t *packet, uint32_t length) {
    struct np_ip ip;
    return np_parse(packet, length, &ip) && (ip.version == 6 || np_fold(np_sum(packet, ip.header, 0)) == 0xffff);
}

static void judge(const struct np_table *table, const uint8_t *packet, uint32_t length) {
    uint8_t *copy = malloc(length ? length : 1), address[16], outer[16] = {192, 168, 1, (uint8_t)number(5)}, *icmp = malloc(NP_ICMP_MAX);
    uint16_t port;
    bool right = header_right(packet, length);
    memcpy(copy, packet, length);
    if (api_leave(table, copy, length, address, &port) == NP_GOES) {
        require(copy[copy[0] >> 4 == 4 ? 8 : 7] + 1 == packet[packet[0] >> 4 == 4 ? 8 : 7], "one hop less");
        require(!right || header_right(copy, length), "the header's checksum is right after a hop");
    }
    memcpy(copy, packet, length);
    api_arrive(table, copy, length, outer, 4);
    int written = api_complain(packet, length, outer, (int)number(3), 1472, icmp);
    require(written == 0 || header_right(icmp, (uint32_t)written), "an ICMP error's header is right");
    free(copy);
    free(icmp);
}

static void cut_and_join(const uint8_t *packet, uint32_t length) {
    static uint8_t out[1 << 19], joined[1 << 19];
    static uint32_t lengths[NP_MAX_SEGMENTS], joined_lengths[NP_MAX_SEGMENTS], sizes[NP_MAX_SEGMENTS];
    struct np_ip ip;
    if (!np_parse(packet, length, &ip)) {
        return;
    }
    uint32_t size = number(3) ? 16 + number(600) : number(64), transport = number(8) ? ip.header : number(200);
    int n = api_segment(packet, length, transport, ip.protocol == 17 ? 17 : 6, size, out, lengths);
    if (n < 0) {
        return;
    }
    uint32_t total = 0;
    for (int i = 0; i < n; i++) {
        total += lengths[i];
    }
    uint8_t *exact = malloc(total ? total : 1);
    memcpy(exact, out, total);
    int m = api_merge(exact, lengths, n, 1, joined, joined_lengths, sizes);
    bool plain = transport == ip.header && !ip.fragment && ip.protocol == 6 && (ip.version == 6 || ip.header == 20) &&
                 packet[ip.header + 13] == 0x10 && n > 1 && n <= NP_MERGE_PIECES && header_right(packet, length);
    if (plain) {
        uint32_t at = ip.header + (uint32_t)(packet[ip.header + 12] >> 4) * 4;
        require(m == 1 && sizes[0] == size && joined_lengths[0] == ip.total, "what was cut is joined to one");
        require(memcmp(joined + at, packet + at, ip.total - at) == 0, "the payload is what it was");
        require(ip.version == 6 || np_fold(np_sum(joined, ip.header, 0)) == 0xffff, "the joined header is right");
    }
    free(exact);
}

static void join_anything(void) {
    static uint8_t out[1 << 19];
    uint32_t lengths[24], out_lengths[25], sizes[25], total = 0;
    int n = (int)number(24);
    uint8_t *packets = malloc(24 * 4200);
    for (int i = 0; i < n; i++) {
        uint8_t one[8192];
        lengths[i] = i > 0 && number(2) ? lengths[0] : mutate(one, seed_packet(one));
        memcpy(packets + total, i > 0 && lengths[i] == lengths[0] ? packets : one, lengths[i]);
        total += lengths[i];
    }
    uint8_t *exact = malloc(total ? total : 1);
    memcpy(exact, packets, total);
    free(packets);
    api_merge(exact, lengths, n, (int)number(2), out, out_lengths, sizes);
    free(exact);
}

int main(int argc, char **argv) {
    struct np_peer peers[6];
    time_t end = time(NULL) + (argc > 1 ? atoi(argv[1]) : 5);
    state ^= argc > 2 ? strtoull(argv[2], NULL, 10) : 0;
    memset(peers, 0, sizeof peers);
    for (int i = 0; i < 6; i++) {
        struct np_peer *p = &peers[i];
        p->prefix.family = p->address.family = i < 4 ? 4 : 6;
        memcpy(p->prefix.bytes, i < 4 ? "\x0a\xf4" : "\xfd\0\2\x44", i < 4 ? 2 : 4);
        p->prefix.bytes[i < 4 ? 2 : 7] = (uint8_t)(i < 4 ? i : i - 4);
        p->length = i == 3 ? 26 : i < 4 ? 24 : 64;
        p->port = 8285;
        memcpy(p->address.bytes, "\xc0\xa8\x01", 3);
        p->address.bytes[3] = (uint8_t)i;
    }
    struct np_table *table = np_table_make(peers, 6);
    uint64_t rounds = 0;
    for (; time(NULL) < end; rounds++) {
        uint8_t packet[8192];
        uint32_t length = mutate(packet, seed_packet(packet));
        uint8_t *exact = malloc(length ? length : 1);
        memcpy(exact, packet, length);
        judge(table, exact, length);
        cut_and_join(exact, length);
        free(exact);
        join_anything();
    }
    np_table_free(table);
    printf("%llu rounds, nothing found\n", (unsigned long long)rounds);
    return 0;
}
