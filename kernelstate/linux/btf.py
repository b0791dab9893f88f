"""Where fields lie in structs of the running kernel, from the kernel's own description (BTF) through libbpf.

    offsets([("sk_buff", "head"), ("net_device", "nd_net.net")])  -->  [192, 280]     bytes from the start of the struct

What reads kernel memory asks here and not the headers on disk: they may be of another kernel, and would be wrong without a word.
Source: include/uapi/linux/btf.h, libbpf 1.1 btf.h.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from kernelstate.errors import MissingFeatureError
from kernelstate.linux.libbpf import library

KIND_STRUCT, KIND_UNION = 4, 5
_HEAD = struct.Struct("=III")  # name_off, info, size
_MEMBER = struct.Struct("=III")  # name_off, type, offset in bits


def offsets(fields: Sequence[tuple[str, str]]) -> list[int]:
    """Return where each (struct, field) lies; a field of a field is written with a dot, unnamed structs in between are passed through.

    Raises MissingFeatureError where the kernel has no BTF, or no such field.
    """
    lib = _library()
    btf = lib.btf__load_vmlinux_btf()
    if not btf:
        raise MissingFeatureError("BTF", "no /sys/kernel/btf/vmlinux: the kernel is built without CONFIG_DEBUG_INFO_BTF")
    try:
        return [_offset(lib, btf, name, field.split(".")) for name, field in fields]
    finally:
        lib.btf__free(btf)


def _offset(lib: Any, btf: int, name: str, path: list[str]) -> int:
    number = lib.btf__find_by_name_kind(btf, name.encode(), KIND_STRUCT)
    bits = 0
    for part in path:
        found = (
            next(((at, kind) for field, at, kind in _members(lib, btf, number) if field == part), None) if number > 0 else None
        )
        if found is None:
            raise MissingFeatureError("BTF", f"struct {name} of this kernel has no {'.'.join(path)}")
        bits, number = bits + found[0], found[1]
    return bits // 8


def _members(lib: Any, btf: int, number: int) -> Iterator[tuple[str, int, int]]:
    """Yield (name, bits from the start, type) of every field of a struct or union, those of unnamed ones inside it included."""
    number = lib.btf__resolve_type(btf, number)
    address = lib.btf__type_by_id(btf, number)
    _, info, _ = _HEAD.unpack(ctypes.string_at(address, _HEAD.size))
    if info >> 24 & 0x1F not in {KIND_STRUCT, KIND_UNION}:
        return
    for i in range(info & 0xFFFF):
        name_at, kind, at = _MEMBER.unpack(ctypes.string_at(address + _HEAD.size + i * _MEMBER.size, _MEMBER.size))
        bits = at & 0xFFFFFF if info >> 31 else at  # with the flag, the rest is a bit field's width
        name = lib.btf__name_by_offset(btf, name_at).decode()
        if name:
            yield name, bits, kind
        else:
            yield from ((inner, bits + more, its) for inner, more, its in _members(lib, btf, kind))


def _library() -> Any:
    lib = library()
    lib.btf__load_vmlinux_btf.restype = ctypes.c_void_p
    lib.btf__free.argtypes = (ctypes.c_void_p,)
    lib.btf__free.restype = None
    lib.btf__find_by_name_kind.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32)
    lib.btf__resolve_type.argtypes = lib.btf__type_by_id.argtypes = lib.btf__name_by_offset.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint32,
    )
    lib.btf__type_by_id.restype = ctypes.c_void_p
    lib.btf__name_by_offset.restype = ctypes.c_char_p
    return lib
