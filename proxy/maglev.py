"""Consistent hashing: which backend a client's hash leads to, the same on every node, with as little moving as can be.

    hash of the client ---> slot 0..M-1 ---> backend            the kernel hashes, this table is what it looks up

        slot   0 1 2 3 4 5 6 ...
        with   a c b b a c a ...      each backend has M/N slots, one more or less
        no b   a c c a a c a ...      b's slots are shared out among the others; few others change hands

Every backend walks the slots in an order of its own, drawn from its name; in turns, each takes the next free slot on its way.
Decides the table; the hash over the client and its modulus are a renderer's business.

Source: Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256

SIZES = (1021, 16381)
"""Table sizes, prime, so that every stride meets every slot. Changing the size moves most clients, so there are only two."""

SMALL_POOL = 50
"""Up to so many backends the small table is used: each then has 20 slots or more, and shares differ by at most a twentieth."""


def table_size(backends: int) -> int:
    """Return the number of slots for so many backends."""
    return SIZES[0] if backends <= SMALL_POOL else SIZES[1]


@lru_cache(64)
def slots(names: tuple[str, ...]) -> tuple[int, ...]:
    """Return for each slot the index of its backend in ``names``, which are sorted, each once, and not none."""
    size = table_size(len(names))
    walks = [_walk(name, size) for name in names]
    return _fill(walks, size)


def _walk(name: str, size: int) -> tuple[int, int]:
    """Return where a backend begins and by how much it steps on."""
    digest = sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % size, int.from_bytes(digest[8:16], "big") % (size - 1) + 1


def _fill(walks: Sequence[tuple[int, int]], size: int) -> tuple[int, ...]:
    table = [-1] * size
    at = [start for start, _ in walks]
    left = size
    while True:
        for backend, (_, step) in enumerate(walks):
            slot = at[backend]
            while table[slot] >= 0:
                slot = (slot + step) % size
            table[slot] = backend
            at[backend] = slot
            left -= 1
            if not left:
                return tuple(table)
