"""Which subnet a node takes among the leases in etcd. Pure: chance is an argument.

    1  the one it holds                 its key, under the lease it wrote it with
    2  a reservation for its PublicIP   whatever SubnetLen, SubnetMin and SubnetMax say: people chose it
    3  a lease with its PublicIP        the newest; an earlier agent or flanneld took it
    4  the one it had before            from saved state or subnet.env, family by family, if it is free
    5  a free one                       drawn among the first hundred

1 and 3 only if the subnet is still one of those to be had. All other leases (not reservations) with its PublicIP are its own as
well, and stale: they go, so that no other node sends to them.

A claim says what etcd must still look like for it to hold; whoever carries it out lets etcd compare, and asks again if it does not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from random import Random

import msgspec

from clusterstate.objects import IPNetwork
from overlay.registry.etcd import Entry, NoLeaseError, Subnets
from overlay.registry.subnets import SubnetPool


class Held(msgspec.Struct, frozen=True):
    """What this node wrote: a key, and the number of the lease with which it did (0: a reservation)."""

    key: str
    lease: int


class Claim(msgspec.Struct, frozen=True):
    """What to take: ``entry`` as it is now, None for a new key; ``stale`` goes in the same step."""

    subnets: Subnets
    entry: Entry | None
    stale: tuple[Entry, ...]


def choose(
    entries: Collection[Entry],
    pools: Sequence[SubnetPool],
    public_ip: IPv4Address,
    *,
    held: Held | None,
    previous: Iterable[IPNetwork],
    blocked: Iterable[IPNetwork] = (),
    random: Random,
) -> Claim:
    """Return what the node with ``public_ip`` takes; ``pools`` of the families that are on, IPv4 first.

    ``previous``: the subnets it had, of any family, the best first. ``blocked``: taken by nobody knows whom. Raises NoLeaseError when none is free.
    """
    own = [entry for entry in entries if _is_own(entry, public_ip, held)]
    usable = [entry for entry in own if _is_usable(entry, pools)]
    chosen = max(usable, key=lambda e: (_is_held(e, held), not e.lease, e.revision), default=None)
    stale = tuple(entry for entry in own if entry is not chosen and entry.lease)
    if chosen is not None:
        return Claim(chosen.subnets, chosen, stale)
    own_networks = [n for entry in sorted(stale, key=lambda e: -e.revision) for n in entry.subnets.networks]
    taken = [n for entry in entries if entry not in stale for n in entry.subnets.networks] + list(blocked)
    wanted = [*own_networks, *previous]
    return Claim(_subnets([_pick(pool, taken, wanted, random) for pool in pools]), None, stale)


def _is_held(entry: Entry, held: Held | None) -> bool:
    return held is not None and held.lease != 0 and (entry.subnets.name, entry.lease) == (held.key, held.lease)


def _is_own(entry: Entry, public_ip: IPv4Address, held: Held | None) -> bool:
    """Whether a key is this node's: by its address, or, when that has changed, by the lease that only it knows."""
    return entry.attrs.public_ip == public_ip or _is_held(entry, held)


def _is_usable(entry: Entry, pools: Sequence[SubnetPool]) -> bool:
    subnets = entry.subnets
    if {one.version for one in subnets.networks} != {pool.family for pool in pools}:
        return False
    if entry.lease:
        return all(pool.fits(subnets.of(pool.family)) for pool in pools)
    return all(_is_inside(subnets.of(pool.family), pool.network) for pool in pools)


def _is_inside(subnet: IPNetwork | None, network: IPNetwork) -> bool:
    return subnet is not None and subnet.version == network.version and subnet.subnet_of(network)  # type: ignore[arg-type]


def _pick(pool: SubnetPool, taken: list[IPNetwork], wanted: list[IPNetwork], random: Random) -> IPNetwork:
    for one in wanted:
        if pool.fits(one) and not any(one.version == other.version and one.overlaps(other) for other in taken):
            return one
    free = pool.free(taken)
    if not free:
        raise NoLeaseError(f"no free /{pool.length} is left in {pool.network} for this node")
    return random.choice(free)


def _subnets(found: Sequence[IPNetwork]) -> Subnets:
    v4 = next(one for one in found if isinstance(one, IPv4Network))
    return Subnets(v4, next((one for one in found if isinstance(one, IPv6Network)), None))
