/* Whose pods are where: inner prefix -> outer address and port of the node. Longest prefix first; never changed once it is made.
 *
 *   10.244.2.0/24  ->  192.168.1.2 8285          one open-addressing table for each length that occurs, tried from the longest:
 *   10.244.3.0/24  ->  192.168.1.3 8285          clusters have one or two lengths a family, so one or two probes
 *
 * The same table says which inner sources a node may send: those whose longest prefix leads to it.
 */
#ifndef NP_TABLE_H
#define NP_TABLE_H

#include <stdlib.h>

#include "np_packet.h"

struct np_peer {
    struct np_address prefix;
    uint8_t length; /* of the prefix, in bits */
    uint16_t port;
    struct np_address address;
};

struct np_lengths {
    uint8_t family, length;
    uint32_t mask; /* slots - 1 */
    uint32_t *slots; /* index of a peer + 1; 0: free */
};

struct np_table {
    struct np_peer *peers;
    uint32_t count;
    struct np_lengths groups[162]; /* 33 lengths of IPv4 and 129 of IPv6 */
    uint32_t group_count;
    uint32_t address_mask;
    uint32_t *addresses; /* outer addresses, each once: index of a peer that has it + 1 */
    struct np_address own[2]; /* the TUN's, IPv4 and IPv6, which ICMP errors come from; family 0: none */
};

static inline uint32_t np_hash(const uint8_t *bytes, uint32_t seed) {
    uint64_t a, b;
    memcpy(&a, bytes, 8);
    memcpy(&b, bytes + 8, 8);
    uint64_t h = (a ^ (b * 0x9e3779b97f4a7c15u) ^ seed) * 0xff51afd7ed558ccdu;
    h ^= h >> 32;
    h *= 0xc4ceb9fe1a85ec53u;
    return (uint32_t)(h >> 32);
}

/* Clears the bits behind a prefix. */
static inline void np_mask(struct np_address *address, uint8_t length) {
    uint8_t whole = length / 8, size = address->family == 4 ? 4 : 16;
    if (whole < size) {
        address->bytes[whole] &= (uint8_t)(0xff00 >> (length % 8));
        memset(address->bytes + whole + 1, 0, (size_t)(size - whole - 1));
    }
}

static inline bool np_same(const struct np_address *a, const struct np_address *b) {
    return a->family == b->family && memcmp(a->bytes, b->bytes, 16) == 0;
}

static inline const struct np_peer *np_lookup(const struct np_table *table, const struct np_address *address) {
    for (uint32_t g = 0; g < table->group_count; g++) {
        const struct np_lengths *group = &table->groups[g];
        if (group->family != address->family) {
            continue;
        }
        struct np_address masked = *address;
        np_mask(&masked, group->length);
        for (uint32_t at = np_hash(masked.bytes, group->length) & group->mask;; at = (at + 1) & group->mask) {
            uint32_t slot = group->slots[at];
            if (slot == 0) {
                break;
            }
            if (np_same(&table->peers[slot - 1].prefix, &masked)) {
                return &table->peers[slot - 1];
            }
        }
    }
    return NULL;
}

/* Whether any peer has an outer address. */
static inline bool np_knows(const struct np_table *table, const struct np_address *address) {
    if (table->count == 0) {
        return false;
    }
    for (uint32_t at = np_hash(address->bytes, address->family) & table->address_mask;; at = (at + 1) & table->address_mask) {
        uint32_t slot = table->addresses[at];
        if (slot == 0) {
            return false;
        }
        if (np_same(&table->peers[slot - 1].address, address)) {
            return true;
        }
    }
}

static inline void np_table_free(struct np_table *table) {
    if (table == NULL) {
        return;
    }
    for (uint32_t g = 0; g < table->group_count; g++) {
        free(table->groups[g].slots);
    }
    free(table->addresses);
    free(table->peers);
    free(table);
}

static inline int np_by_length(const void *a, const void *b) {
    const struct np_peer *x = a, *y = b;
    if (x->prefix.family != y->prefix.family) {
        return x->prefix.family - y->prefix.family;
    }
    if (x->length != y->length) {
        return y->length - x->length;
    }
    return memcmp(x->prefix.bytes, y->prefix.bytes, 16);
}

static inline uint32_t np_slots_for(uint32_t count) {
    uint32_t slots = 4;
    while (slots < 2 * count) {
        slots *= 2;
    }
    return slots;
}

/* Makes a table of peers (copied); no two may have one prefix. NULL: no memory. */
static inline struct np_table *np_table_make(const struct np_peer *peers, uint32_t count) {
    struct np_table *table = calloc(1, sizeof *table);
    if (table == NULL) {
        return NULL;
    }
    table->count = count;
    table->address_mask = np_slots_for(count) - 1;
    table->peers = calloc(count ? count : 1, sizeof *peers);
    table->addresses = calloc(table->address_mask + 1, sizeof *table->addresses);
    if (table->peers == NULL || table->addresses == NULL) {
        np_table_free(table);
        return NULL;
    }
    if (count > 0) {
        memcpy(table->peers, peers, count * sizeof *peers);
        qsort(table->peers, count, sizeof *peers, np_by_length);
    }
    for (uint32_t first = 0, next; first < count; first = next) {
        const struct np_peer *peer = &table->peers[first];
        next = first;
        while (next < count && table->peers[next].length == peer->length && table->peers[next].prefix.family == peer->prefix.family) {
            next++;
        }
        struct np_lengths *group = &table->groups[table->group_count];
        group->family = peer->prefix.family;
        group->length = peer->length;
        group->mask = np_slots_for(next - first) - 1;
        group->slots = calloc(group->mask + 1, sizeof *group->slots);
        if (group->slots == NULL) {
            np_table_free(table);
            return NULL;
        }
        table->group_count++;
        for (uint32_t i = first; i < next; i++) {
            uint32_t at = np_hash(table->peers[i].prefix.bytes, group->length) & group->mask;
            while (group->slots[at] != 0) {
                at = (at + 1) & group->mask;
            }
            group->slots[at] = i + 1;
        }
    }
    for (uint32_t i = 0; i < count; i++) {
        const struct np_address *address = &table->peers[i].address;
        uint32_t at = np_hash(address->bytes, address->family) & table->address_mask;
        while (table->addresses[at] != 0 && !np_same(&table->peers[table->addresses[at] - 1].address, address)) {
            at = (at + 1) & table->address_mask;
        }
        if (table->addresses[at] == 0) {
            table->addresses[at] = i + 1;
        }
    }
    return table;
}

#endif
