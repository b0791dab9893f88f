"""Tables of Services in the kernel's maps, of whichever programs: read whole, written change by change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kernelstate import service_maps as codec
from kernelstate.linux.libbpf import Map
from kernelstate.service_layout import Contents, MapWrite, Sizes


def read_tables(maps: Mapping[str, Map]) -> tuple[Sizes, Contents]:
    """Read everything; of slots, as many as frontends lead to. Raises KernelRefusedError."""
    frontends = maps["frontends"].dump()
    placed = [codec.read_service(value) for value in frontends.values()]
    room = maps["slots"].entries
    top = min(max((one.first + one.size for one in placed), default=0), room)
    slots = maps["slots"].dump(top)
    sizes = Sizes(*(maps[name].entries for name in ("frontends", "slots", "members", "own")))
    return sizes, Contents(frontends, slots, maps["members"].dump().keys(), maps["own"].dump())


def write_tables(maps: Mapping[str, Map], writes: Sequence[MapWrite]) -> None:
    """Write one after the other. Raises KernelRefusedError."""
    for one in writes:
        table = maps[one.table]
        if one.put:
            table.update(one.put)
        table.remove(one.drop)
