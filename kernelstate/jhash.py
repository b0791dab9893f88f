"""The kernel's hash for tables, and how nftables brings it into a range.

Source: include/linux/jhash.h (Bob Jenkins, lookup3, public domain); net/netfilter/nft_hash.c (nft_jhash_eval);
include/linux/kernel.h (reciprocal_scale).
"""

from __future__ import annotations

_BEGIN = 0xDEADBEEF
_ALL = 0xFFFFFFFF


def jhash_mod(data: bytes, modulus: int, seed: int) -> int:
    """Return what ``jhash ... mod MODULUS seed SEED`` is for the bytes of an address, in network order: 0 to modulus - 1.

    ``data`` is 4 or 16 bytes long. The words are read as a little-endian machine reads them; others hash differently.
    """
    return (jhash(data, seed) * modulus) >> 32


def jhash(data: bytes, seed: int) -> int:
    """Return the 32-bit hash of ``data``, whose length is a multiple of four and not zero."""
    words = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
    a = b = c = (_BEGIN + len(data) + seed) & _ALL
    while len(words) > 3:
        a, b, c = _mix((a + words[0]) & _ALL, (b + words[1]) & _ALL, (c + words[2]) & _ALL)
        words = words[3:]
    rest = words + [0] * (3 - len(words))
    return _final((a + rest[0]) & _ALL, (b + rest[1]) & _ALL, (c + rest[2]) & _ALL)


def _left(word: int, bits: int) -> int:
    return ((word << bits) | (word >> (32 - bits))) & _ALL


def _mix(a: int, b: int, c: int) -> tuple[int, int, int]:
    for bits in (4, 6, 8, 16, 19, 4):
        a = ((a - c) & _ALL) ^ _left(c, bits)
        c = (c + b) & _ALL
        a, b, c = b, c, a
    return a, b, c


def _final(a: int, b: int, c: int) -> int:
    c = ((c ^ b) - _left(b, 14)) & _ALL
    a = ((a ^ c) - _left(c, 11)) & _ALL
    b = ((b ^ a) - _left(a, 25)) & _ALL
    c = ((c ^ b) - _left(b, 16)) & _ALL
    a = ((a ^ c) - _left(c, 4)) & _ALL
    b = ((b ^ a) - _left(a, 14)) & _ALL
    return ((c ^ b) - _left(b, 24)) & _ALL
