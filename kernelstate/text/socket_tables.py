"""What sockets are told of Services, as JSON that people can read and tools can compare: frontends, pools, own addresses.

    {"frontends": {"10.96.0.1:80/tcp": {"who": ["node", "pods"], "pool": "8c1f..."}}, "pools": {"8c1f...": {"endpoints": [...]}}, ...}

There is no native tool that takes such tables; numbers of slots are the kernel's business, so the same input gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from kernelstate.objects.address import Family, address_text
from kernelstate.objects.ebpf import Pool, SocketService, SocketTables, Who, end_text


def print_sockets(tables: SocketTables, families: Collection[Family]) -> str:
    """Print the tables of these families, everything in order."""
    frontends = {str(key): _service(service) for key, service in sorted(tables.frontends.items()) if key.family in families}
    pools = sorted((number, pool) for number, pool in tables.pools.items() if pool.family in families)
    own = {address_text(*key): _who(who) for key, who in sorted(tables.own.items()) if key[0] in families}
    found = {"frontends": frontends, "pools": {_number(n): _pool(pool) for n, pool in pools}, "nodePortAddresses": own}
    return json.dumps(found, indent=1) + "\n"


def _service(service: SocketService) -> dict[str, Any]:
    found: dict[str, Any] = {"who": _who(service.who)}
    if service.pool:
        found["pool"] = _number(service.pool)
    if service.refuses:
        found["refuses"] = True
    if service.affinity:
        found["affinitySeconds"] = service.affinity
    return found


def _pool(pool: Pool) -> dict[str, Any]:
    endpoints = [f"{end_text(pool.family, address)}:{port}" for address, port in pool.endpoints]
    return {"protocol": pool.protocol, "endpoints": endpoints, "remembers": pool.remembers, "podsOnly": pool.pods_only}


def _who(who: Who) -> list[str]:
    return [name for name, one in (("node", Who.NODE), ("pods", Who.PODS)) if who & one]


def _number(pool: int) -> str:
    return f"{pool:016x}"
