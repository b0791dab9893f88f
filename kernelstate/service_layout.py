"""From tables of Services at the socket to writes into the kernel's maps, in an order in which no program meets half a change.

    1  slots      the endpoints of a changed pool, where no frontend leads yet
    2  members    who is in it now
    3  frontends  lead there, each in one step; own addresses
    4  frontends and addresses that are gone, members that left        then the pool's old slots may rest

A ``Layout`` knows where pools lie, and nothing else of the maps: a change names what differs. ``adopt`` finds out all of it, from
maps that somebody filled before. Pure; the maps are behind ``reconcile_ebpf.ServiceMapsPort``.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from kernelstate import service_maps as codec
from kernelstate.objects.ebpf import Pool, SocketFrontend, SocketService, SocketTables
from kernelstate.slots import NoRoomError, Slots, room_of

MapName: TypeAlias = Literal["slots", "members", "frontends", "own"]
MAPS: tuple[MapName, ...] = ("slots", "members", "frontends", "own")
FEWEST = 1 << 14
"""Least room in each map; also what the programs are built with, so that most clusters never outgrow it."""
_PRESENT = (1).to_bytes(4, "little")


class MapWrite(msgspec.Struct, frozen=True):
    """Entries to be put into one map, and keys to be taken out of it."""

    table: MapName
    put: Mapping[bytes, bytes] = {}
    drop: Collection[bytes] = ()

    def __len__(self) -> int:
        """Count entries."""
        return len(self.put) + len(self.drop)


class Contents(msgspec.Struct, frozen=True):
    """What is in the maps; ``slots`` are those that frontends lead to."""

    frontends: Mapping[bytes, bytes] = {}
    slots: Mapping[bytes, bytes] = {}
    members: Collection[bytes] = ()
    own: Mapping[bytes, bytes] = {}


class Sizes(msgspec.Struct, frozen=True):
    """How many entries each map has room for."""

    frontends: int = FEWEST
    slots: int = FEWEST
    members: int = FEWEST
    own: int = FEWEST

    @classmethod
    def for_(cls, tables: SocketTables) -> Sizes:
        """Return sizes in which the tables can double, and every pool change at once."""
        slots = sum(room_of(len(pool.endpoints)) for pool in tables.pools.values())
        members = sum(len(pool.endpoints) for pool in tables.pools.values() if pool.remembers)
        wanted = (len(tables.frontends), slots, members, len(tables.own))
        return cls(*(max(FEWEST, room_of(max(2 * n, 1))) for n in wanted))


class Layout:
    """Where pools lie in maps of given sizes."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._slots = Slots(sizes.slots)
        self._pools: dict[int, tuple[Pool, int]] = {}
        """By number: the pool, and its first slot."""
        self._members = 0

    def fill(self, tables: SocketTables) -> list[MapWrite]:
        """Return what fills empty maps. Raises NoRoomError."""
        return self.change(tables, tables.frontends, tables.pools, 0.0) + _some(MapWrite("own", _own(tables)))

    def change(
        self, tables: SocketTables, frontends: Iterable[SocketFrontend], pools: Iterable[int], now: float
    ) -> list[MapWrite]:
        """Return what brings these frontends and pools to the maps, or takes them out. ``now``: seconds. Raises NoRoomError.

        Own addresses never change: with them everything is laid out anew, or adopted. After NoRoomError the layout is not to be used any more: lay out everything anew, in larger maps.
        """
        moved = self._move(tables, pools, now)
        put, drop = {}, []
        for frontend in frontends:
            key, service = codec.pack_frontend(frontend), tables.frontends.get(frontend)
            if service is None:
                drop.append(key)
            else:
                put[key] = self._value(service)
        self._check(tables)
        return _some(
            MapWrite("slots", moved.slots),
            MapWrite("members", dict.fromkeys(moved.joined, _PRESENT)),
            MapWrite("frontends", put),
            MapWrite("frontends", drop=drop),
            MapWrite("members", drop=moved.left),
        )

    def adopt(self, found: Contents, tables: SocketTables, now: float) -> list[MapWrite]:
        """Take over maps that hold something; return what makes them as wanted. Raises NoRoomError if they are in no order."""
        self._learn(found)
        numbers = {*self._pools, *tables.pools}
        moved = self._move(tables, [n for n in numbers if self._pool(n) != tables.pools.get(n)], now)
        wanted = {codec.pack_frontend(frontend): self._value(service) for frontend, service in tables.frontends.items()}
        members = {m for number, pool in tables.pools.items() for m in _members(number, pool)}
        own = _own(tables)
        self._members = len(members)
        self._check(tables)
        return _some(
            MapWrite("slots", moved.slots),
            MapWrite("members", dict.fromkeys(sorted(members - set(found.members)), _PRESENT)),
            MapWrite("frontends", _differing(wanted, found.frontends)),
            MapWrite("own", _differing(own, found.own)),
            MapWrite("frontends", drop=sorted(found.frontends.keys() - wanted.keys())),
            MapWrite("own", drop=sorted(found.own.keys() - own.keys())),
            MapWrite("members", drop=sorted(set(found.members) - members)),
        )

    # -- pools -------------------------------------------------------------------------------------------------------

    def _pool(self, number: int) -> Pool | None:
        held = self._pools.get(number)
        return held[0] if held is not None else None

    def _value(self, service: SocketService) -> bytes:
        if not service.pool:
            return codec.pack_service(codec.Placed(service, 0, 0))
        pool, first = self._pools[service.pool]
        return codec.pack_service(codec.Placed(service, first, len(pool.endpoints), pool.pods_only))

    def _move(self, tables: SocketTables, pools: Iterable[int], now: float) -> _Moved:
        """Lay each pool that differs out anew; what it leaves rests."""
        moved = _Moved({}, [], [])
        for number in pools:
            pool, held = tables.pools.get(number), self._pools.pop(number, None)
            if held is not None and held[0] == pool:
                self._pools[number] = held
                continue
            if pool is not None:
                first = self._slots.take(len(pool.endpoints), now)
                self._pools[number] = (pool, first)
                moved.slots.update(
                    zip(map(codec.pack_index, range(first, first + len(pool.endpoints))), codec.pack_pool(pool), strict=True)
                )
            if held is not None:
                self._slots.leave(held[1], len(held[0].endpoints), now)
            before, after = _members(number, held[0] if held is not None else None), _members(number, pool)
            if before or after:
                moved.joined.extend(sorted(after - before))
                moved.left.extend(sorted(before - after))
        self._members += len(moved.joined) - len(moved.left)
        return moved

    def _check(self, tables: SocketTables) -> None:
        """Raise NoRoomError if what comes before what leaves does not fit."""
        wanted = (len(tables.frontends), self._members, len(tables.own))
        room = (self.sizes.frontends, self.sizes.members, self.sizes.own)
        if any(4 * n > 3 * size for n, size in zip(wanted, room, strict=True)):
            raise NoRoomError

    def _learn(self, found: Contents) -> None:
        """Find out where pools lie. Of a pool that is in two places, as after a change that broke off, one place counts."""
        rooms: dict[int, tuple[int, int]] = {}
        of_pods: dict[int, bool] = {}
        for value in found.frontends.values():
            placed = codec.read_service(value)
            if placed.service.pool and placed.size:
                rooms[placed.service.pool] = (placed.first, placed.size)
                of_pods[placed.service.pool] = placed.pods_only
        self._slots.occupy(rooms.values())
        members = set(found.members)
        for number, (first, count) in rooms.items():
            try:
                ends = [codec.read_frontend(found.slots[codec.pack_index(first + i)]) for i in range(count)]
            except (KeyError, struct.error) as error:
                raise NoRoomError from error
            remembers = codec.pack_member(number, found.slots[codec.pack_index(first)]) in members
            endpoints = tuple((end.address, end.port) for end in ends)
            self._pools[number] = (Pool(ends[0].family, ends[0].protocol, endpoints, remembers, of_pods[number]), first)


def contents_of(tables: SocketTables) -> Contents:
    """Return what maps hold that were filled afresh."""
    held: dict[MapName, dict[bytes, bytes]] = {name: {} for name in MAPS}
    for write in Layout(Sizes.for_(tables)).fill(tables):
        held[write.table].update(write.put)
    return Contents(held["frontends"], held["slots"], held["members"].keys(), held["own"])


class _Moved(NamedTuple):
    slots: dict[bytes, bytes]
    joined: list[bytes]
    left: list[bytes]


def _members(number: int, pool: Pool | None) -> frozenset[bytes]:
    """Return the members of a pool that remembers; of another there are none."""
    if pool is None or not pool.remembers:
        return frozenset()
    return frozenset(codec.pack_member(number, end) for end in codec.pack_pool(pool))


def _own(tables: SocketTables) -> dict[bytes, bytes]:
    return {codec.pack_address(*address): codec.pack_who(who) for address, who in tables.own.items()}


def _differing(wanted: Mapping[bytes, bytes], found: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    return {key: value for key, value in wanted.items() if found.get(key) != value}


def _some(*writes: MapWrite) -> list[MapWrite]:
    return [write for write in writes if len(write)]
