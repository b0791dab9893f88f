/* The tables of Services, as the kernel's programs read them and the agent writes them: one layout, said once.
 *
 *     frontends   address port protocol ----> service: slots first .. first + count - 1, an id, for whom
 *     own         an address of the node ---> for whom NodePorts answer there; they are frontends of the address 0
 *     slots       number -------------------> endpoint
 *     members     id, endpoint -------------> is still one of the pool (asked where a client is remembered)
 *     clients     client, id ---------------> the endpoint it had last, and when
 *     visitors    address, id --------------> the same, of who asks by packets
 *     peers       socket, endpoint ---------> the frontend that the socket believes to speak to
 *
 * A pool lies in consecutive slots. Another pool is written to other slots first; then the frontend, in one step, leads there. So
 * nobody ever meets half of a pool. Slots that were left are used again after a while only.
 *
 * Addresses are 16 bytes, IPv4 as ::ffff:a.b.c.d; addresses and ports are in the wire's byte order, the rest in the machine's.
 * No padding is left to the compiler: keys are compared byte by byte. kernelstate/service_maps.py is its twin. */
#ifndef NP_SERVICES_H
#define NP_SERVICES_H

#include <linux/types.h>

/* Who may use a frontend, or an address for NodePorts. */
#define NP_NODE 1 /* processes in the node's own network namespace */
#define NP_PODS 2 /* all others */

/* What a service does with whom it serves but has no endpoint for; else the packet is left to the rules. */
#define NP_REFUSES 1
/* All its endpoints are pods: nobody has to replace the source of who asks from a pod. */
#define NP_PODS_ONLY 2

struct np_end {
	__u32 address[4];
	__be16 port;
	__u8 protocol; /* IPPROTO_TCP or IPPROTO_UDP */
	__u8 zero;
};

struct np_service {
	__u64 id; /* of Service, port, protocol, family and pool */
	__u32 first, count;
	__u32 affinity; /* seconds; 0: none */
	__u8 who, how;
	__u16 zero;
};

struct np_member {
	__u64 id;
	struct np_end end;
	__u32 zero;
};

struct np_client {
	__u64 client; /* the cookie of a socket, or of a network namespace where a Service has affinity */
	__u64 id;
};

struct np_visitor {
	__u32 address[4]; /* of a pod whose packets ask */
	__u64 id;
};

struct np_choice {
	struct np_end end;
	__u32 zero;
	__u64 since; /* nanoseconds, CLOCK_MONOTONIC */
};

struct np_talk {
	__u64 socket; /* its cookie */
	struct np_end end;
	__u32 zero;
};

struct np_settings {
	__u8 build[8]; /* which object file the programs are from */
	__u64 node;    /* the cookie of the node's network namespace */
};

#endif
