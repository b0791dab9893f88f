"""The tables of Services in the short lane's program: the same that programs at sockets have, for packets that no socket of ours sent.

Tables that have become too small come with another program, put in the place of the one at each link between two packets. Implements
``reconcile_ebpf.ServiceMapsPort`` over the lane's (``bpf_lane.py``), which puts programs at links and takes them off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from kernelstate.linux.bpf_lane import LinuxLane
from kernelstate.linux.table_maps import read_tables, write_tables
from kernelstate.service_layout import Contents, MapWrite, Sizes


class PacketTables:
    """What one node's lane knows of Services."""

    def __init__(self, lane: LinuxLane) -> None:
        self._lane = lane

    def observe(self) -> tuple[Sizes, Contents] | None:
        """Read the tables of the program there is."""
        tables = self._lane.tables
        return read_tables(tables) if tables is not None else None

    def install(self, sizes: Sizes, writes: Sequence[MapWrite]) -> None:
        """Have a program with such tables, at the links where one is; where else one has to be is the lane's business."""
        self._lane.exchange(msgspec.structs.asdict(sizes), lambda tables: write_tables(tables, writes))

    def write(self, writes: Sequence[MapWrite]) -> None:
        """Change the tables."""
        tables = self._lane.tables
        assert tables is not None
        write_tables(tables, writes)

    def is_intact(self) -> bool:
        """Whether there is a program: the lane looks after where it is."""
        return self._lane.tables is not None

    def remove(self) -> bool:
        """Leave the tables to the lane, with whose program they go."""
        return False

    def counters(self) -> Mapping[str, int]:
        """Return nothing: the lane counts."""
        return {}
