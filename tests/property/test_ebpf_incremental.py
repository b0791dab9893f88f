"""Whatever the order of changes, sockets are told what the last cluster says; maps that were changed equal maps written afresh."""

import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from service_worlds import NODE, snapshots
from service_worlds import settings as proxy_settings

from kernelstate.fake_ebpf import FakeServiceMaps
from kernelstate.reconcile_ebpf import SocketReconciler
from kernelstate.service_maps import pack_index, read_service
from kernelstate.slots import NoRoomError, Slots, room_of
from proxy.compile import ServiceCompiler, compile_table
from proxy.render.ebpf_program import EbpfProgram, render_ebpf

FAMILIES = (4, 6)


def differing(before, after):
    """Return the Services that a source would report between two snapshots."""
    keys = set(before.services) | set(after.services) | set(before.slices) | set(after.slices)
    return {k for k in keys if before.services.get(k) != after.services.get(k) or before.slices.get(k) != after.slices.get(k)}


def read(contents):
    """Return what maps say, wherever in the slots it lies."""
    frontends = {}
    for key, value in contents.frontends.items():
        placed = read_service(value)
        ends = [contents.slots[pack_index(placed.first + i)] for i in range(placed.size)]
        frontends[key] = placed.service, ends
    return frontends, set(contents.members), contents.own


@settings(max_examples=60, deadline=None)
@given(
    st.lists(snapshots(families=FAMILIES, least=1), min_size=2, max_size=4),
    proxy_settings(),
    st.lists(st.sampled_from(["", "", "forget", "lost", "refused"]), min_size=4, max_size=4),
)
def test_maps_follow(history, config, events):
    """After any history, with restarts, programs taken off and refused writes, maps say what fresh ones say."""
    maps, clock = FakeServiceMaps(), itertools.count()
    reconciler = SocketReconciler(maps, lambda: 5.0 * next(clock))
    compiler, program = ServiceCompiler(NODE), EbpfProgram(config, NODE, FAMILIES)
    compiler.update(history[0], None)
    program.update(compiler.entries, None)
    reconciler.set_desired(program.tables)
    assert reconciler.sync().ok
    for (before, after), event in zip(itertools.pairwise(history), events, strict=False):
        change = program.update(compiler.entries, compiler.update(after, differing(before, after)))
        reconciler.set_desired(program.tables, change)
        if event == "forget":
            reconciler.forget()
        elif event == "lost":
            maps.maps = {}
        elif event == "refused" and reconciler.dirty:
            maps.refusing = True
            reconciler.sync()
            maps.refusing = False
        assert reconciler.sync().ok
        assert not reconciler.dirty
    fresh, wanted = FakeServiceMaps(), render_ebpf(compile_table(history[-1], NODE), config, NODE)
    assert program.tables == wanted
    other = SocketReconciler(fresh, lambda: 0.0)
    other.set_desired(wanted)
    other.sync()
    assert read(maps.contents) == read(fresh.contents)
    again = SocketReconciler(maps, lambda: 0.0)
    again.set_desired(wanted)
    assert again.sync().changed == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 3)), min_size=1, max_size=60), st.randoms())
def test_no_room_is_given_twice(asked, random):
    """Rooms in use or at rest never overlap, whatever is taken and left, also when an array is found in use."""
    slots, held, now, resting = Slots(256), [], 0.0, []
    for count, pause in asked:
        now += pause
        resting = [one for one in resting if one[2] > now]
        try:
            first = slots.take(count, now)
        except NoRoomError:
            continue
        held.append((first, count))
        used = Counter(i for f, c, *_ in (*held, *resting) for i in range(f, f + c))
        assert max(used.values()) == 1
        assert max(used) < 256
        if random.random() < 0.5:
            gone = held.pop(random.randrange(len(held)))
            slots.leave(*gone, now)
            resting.append((*gone, now + 1.0))
        if random.random() < 0.1:
            slots = Slots(256)
            slots.occupy(held)
            resting = []
    assert all(room_of(count) >= count for _, count in held)
