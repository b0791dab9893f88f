/* What becomes of one packet, before anything is done with it: the rules of the tunnel, in one place for every caller.
 *
 *   leaving    a packet from a pod, on its way to the node of another: which?     no route, TTL over: not any
 *   arriving   a datagram from another node: may it come in?                      known node, its own pod as source, TTL left
 */
#ifndef NP_JUDGE_H
#define NP_JUDGE_H

#include "np_table.h"

enum np_fate {
    NP_GOES, /* sent, or let in */
    NP_NO_ROUTE,
    NP_TTL_EXCEEDED,
    NP_UNKNOWN_PEER,
    NP_WRONG_SOURCE,
    NP_MALFORMED,
    NP_FATES
};

/* Judges a packet that leaves, and takes one hop from it if it goes. */
static inline enum np_fate np_leaving(const struct np_table *table, uint8_t *packet, size_t length, struct np_ip *ip,
                                      const struct np_peer **peer) {
    struct np_address destination;
    if (!np_parse(packet, length, ip)) {
        return NP_MALFORMED;
    }
    np_destination(packet, ip, &destination);
    *peer = np_lookup(table, &destination);
    if (*peer == NULL) {
        return NP_NO_ROUTE;
    }
    return np_hop(packet, ip) ? NP_GOES : NP_TTL_EXCEEDED;
}

/* Judges a datagram's packet that arrives from the node at `outer`, and takes one hop from it if it comes in. */
static inline enum np_fate np_arriving(const struct np_table *table, uint8_t *packet, size_t length,
                                       const struct np_address *outer, struct np_ip *ip) {
    struct np_address source;
    if (!np_knows(table, outer)) {
        return NP_UNKNOWN_PEER;
    }
    if (!np_parse(packet, length, ip)) {
        return NP_MALFORMED;
    }
    np_source(packet, ip, &source);
    const struct np_peer *owner = np_lookup(table, &source);
    if (owner == NULL || !np_same(&owner->address, outer)) {
        return NP_WRONG_SOURCE;
    }
    return np_hop(packet, ip) ? NP_GOES : NP_TTL_EXCEEDED;
}

#endif
