"""Keeps virtual servers as desired: remembers, compares what changed, writes the difference, lets connections end.

      set_desired(state, changed)                              somebody else
              |                                                     | ipvsadm -C
              v                                                     v
      desired --diff--> changes --port.apply--> IPVS --count, a few looked at in turn--> is that what we remember?
              ^             |                     |
              '--- dirty <--+-- refused: looked up, tried once more, told
                                                  '--> draining: weight 0; deleted when no connection is left

IPVS tells of no change. So ``drifted`` compares the number of virtual servers, which costs one system call but counts IPv4 only,
and looks at ``SAMPLE`` of those we remember in turn; what both miss, ``forget`` and the next ``sync`` repair. It also says yes when
real servers that drain are due for a look. What the difference is and what is ours is decided in ``diff_ipvs.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import msgspec

from kernelstate.diff_ipvs import IpvsChange, IpvsOwnership, RealKey, diff_ipvs
from kernelstate.errors import KernelStateError
from kernelstate.objects.address import Prefix
from kernelstate.objects.ipvs import IpvsState, RealServer, ServerKey, VirtualServer
from kernelstate.ports import SyncReport

SAMPLE = 8
"""So many virtual servers are looked at by each ``drifted``: half a millisecond."""
DRAIN_LOOK = 3.0
"""Seconds between two looks at real servers that drain."""
DRAIN_SHARE = 50
"""At least so many times as long as a look took until the next one."""
SHOWN_ERRORS = 20
"""So many refusals of one sync are told one by one; the rest as a number."""


class SeenReal(NamedTuple):
    """A real server as observed; ``active`` and ``inactive`` count its connections, templates of persistence left out."""

    address: int
    port: int
    weight: int
    active: int = 0
    inactive: int = 0


class IpvsPort(Protocol):
    """Reading and writing the virtual servers of the current network namespace. Everything may raise KernelStateError."""

    def servers(self) -> dict[ServerKey, VirtualServer]:
        """Return every virtual server, whoever made it, without its real servers."""

    def real_servers(self, key: ServerKey) -> list[SeenReal]:
        """Return the real servers of one virtual server; none if there is no such virtual server."""

    def read(self, keys: Collection[ServerKey]) -> dict[ServerKey, VirtualServer]:
        """Return these virtual servers, without real servers, as far as they exist."""

    def count(self) -> int:
        """Return how many IPv4 virtual servers there are, whoever made them; costs microseconds."""

    def apply(self, changes: Sequence[IpvsChange]) -> list[str]:
        """Do each, in order, going on after failures; return the kernel's words for each, empty for done.

        Deleting what is gone is success.
        """


class IpvsReconciler:
    """The virtual servers of one network namespace; implements ``ports.Reconciler``. Not safe for several threads at once.

    ``service_addresses`` tells the addresses of our link when the kernel is observed. ``drain_seconds`` bounds how long a real
    server that goes keeps its connections: None as long as they last, 0 not at all.
    """

    part = "ipvs"

    def __init__(
        self,
        port: IpvsPort,
        service_addresses: Callable[[], Collection[Prefix]] = frozenset,
        *,
        drain_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._port, self._service_addresses = port, service_addresses
        self._drain_seconds, self._clock = drain_seconds, clock
        self._ownership = IpvsOwnership()
        self._desired: IpvsState | None = None
        self._kernel: dict[ServerKey, VirtualServer] = {}
        """What there is, without what drains; holds the desired object itself wherever the two are equal."""
        self._draining: dict[ServerKey, dict[RealKey, float]] = {}
        """Real servers of weight 0 by the time at which they go whatever happens."""
        self._candidates: set[ServerKey] | None = None
        """What may differ; None: everything."""
        self._suspect: set[ServerKey] = set()
        """What has to be looked up before it is compared."""
        self._errors: dict[ServerKey, str] = {}
        self._count: int | None = None
        """How many virtual servers our last look or write left behind; None: look first."""
        self._next_look = 0.0
        self._turn: Iterator[ServerKey] = iter(())

    def set_desired(
        self, state: IpvsState, changed: Collection[ServerKey] | None = None, ownership: IpvsOwnership | None = None
    ) -> None:
        """Say what shall exist from now on; nothing is written before ``sync``.

        ``changed`` names every server that differs from the state handed over before, None means any may. Without ``ownership``
        nothing changes in that.
        """
        self._desired = state
        if ownership is not None:
            self._ownership = ownership
        if changed is None:
            self._candidates = None
        elif self._candidates is not None:
            self._candidates.update(changed)

    @property
    def dirty(self) -> bool:
        """Whether something desired is known not to be in the kernel yet. Real servers that drain do not count."""
        unsettled = self._count is None or self._candidates != set() or self._suspect or self._errors
        return self._desired is not None and bool(unsettled)

    @property
    def draining(self) -> int:
        """How many real servers keep connections, but get no new ones."""
        return sum(map(len, self._draining.values()))

    def forget(self) -> None:
        """Trust no memory: the next ``sync`` observes everything."""
        self._count = None

    def drifted(self) -> bool:
        """Cheap check whether somebody else changed what is ours, or real servers that drain are due for a look."""
        if self._desired is None:
            return False
        if self._count is not None:
            try:
                if self._port.count() != self._count:
                    self.forget()
                else:
                    self._check_some()
            except KernelStateError:
                self.forget()
        return self._count is None or bool(self._suspect - self._errors.keys()) or self._is_look_due()

    def sync(self) -> SyncReport:
        """Write what differs. The first sync, and one after ``forget``, observes first; without a change nothing is asked."""
        if self._desired is None:
            return SyncReport(self.part)
        done = 0
        try:
            if self._count is None:
                self._observe()
            done = self._settle(self._desired)
            done += self._end_drained()
        except KernelStateError as error:
            self._candidates = None
            self.forget()
            return SyncReport(self.part, done, (str(error),))
        return SyncReport(self.part, done, self._error_lines())

    def cleanup(self) -> SyncReport:
        """Remove every virtual server of ours; a later ``sync`` would bring the desired ones back."""
        try:
            self._observe()
            changes = [IpvsChange("delete server", key) for key in sorted(self._kernel)]
            words = self._port.apply(changes)
        except KernelStateError as error:
            return SyncReport(self.part, 0, (str(error),))
        finally:
            self._candidates = None
            self.forget()
        refused = tuple(f"{change}: {said}" for change, said in zip(changes, words, strict=True) if said)
        return SyncReport(self.part, len(changes) - len(refused), refused[:SHOWN_ERRORS])

    # -- looking -----------------------------------------------------------------------------------------------------

    def _observe(self) -> None:
        """Replace memory by what the kernel holds. The count comes first: a change in between is then noticed."""
        count = self._port.count()
        seen = self._port.servers()
        addresses = frozenset(self._service_addresses())
        desired = self._desired or {}
        known, self._kernel, self._draining = self._kernel.keys() | self._draining.keys(), {}, {}
        for key, server in seen.items():
            if key in desired or key in known or self._ownership.claims(key, addresses):
                self._remember(key, server)
        self._candidates = None
        self._suspect.clear()
        self._count = count

    def _look_up(self, keys: Collection[ServerKey]) -> None:
        """Replace memory of some servers by what the kernel holds."""
        seen = self._port.read(keys)
        for key in keys:
            self._draining.pop(key, None)
            if key in seen:
                self._remember(key, seen[key])
            else:
                self._kernel.pop(key, None)

    def _remember(self, key: ServerKey, shape: VirtualServer) -> None:
        """Look at a server's real servers and remember it; quiet ones that are not wanted drain."""
        want = (self._desired or {}).get(key)
        wanted = {real[:2] for real in want.real_servers} if want is not None else set()
        found = sorted(self._port.real_servers(key))
        quiet = {r[:2] for r in found if r.weight == 0 and r[:2] not in wanted and key.protocol == "tcp"}
        reals = tuple(RealServer(*real[:3]) for real in found if real[:2] not in quiet)
        have = msgspec.structs.replace(shape, real_servers=reals)
        self._kernel[key] = want if want is not None and want == have else have
        if quiet:
            self._drain(key, quiet)

    def _check_some(self) -> None:
        """Look at a few servers that we remember; those that are not as remembered are looked up by the next sync."""
        keys = [key for key in self._next_in_turn() if key not in self._suspect]
        if not keys:
            return
        seen = self._port.read(keys)
        for key in keys:
            if key not in seen:
                self.forget()  # what took one may have taken all
                return
            quiet = self._draining.get(key, {})
            found = [r for r in sorted(self._port.real_servers(key)) if not (r.weight == 0 and r[:2] in quiet)]
            have = msgspec.structs.replace(seen[key], real_servers=tuple(RealServer(*real[:3]) for real in found))
            if have != self._kernel[key]:
                self._suspect.add(key)

    def _next_in_turn(self) -> list[ServerKey]:
        """Return the next few servers; behind the last one comes the first again."""
        found = [key for key in islice(self._turn, SAMPLE) if key in self._kernel]
        if not found:
            self._turn = iter(list(self._kernel))
            found = list(islice(self._turn, SAMPLE))
        return found

    # -- writing -----------------------------------------------------------------------------------------------------

    def _settle(self, desired: IpvsState) -> int:
        """Compare and write; what is refused is looked up and tried once more, and then told."""
        suspect, self._suspect = self._suspect | self._errors.keys(), set()
        self._errors = {}
        if suspect:
            self._suspect = suspect  # stays so if the look fails
            self._look_up(suspect)
            self._suspect = set()
        if self._candidates is None:
            keys: list[ServerKey] = [*desired, *sorted(key for key in self._kernel if key not in desired)]
        else:
            keys = sorted(self._candidates | suspect)
        done, refused = self._write(desired, keys)
        if refused:
            self._look_up(refused)
            more, self._errors = self._write(desired, sorted(refused))
            done += more
        self._candidates = set()
        return done

    def _write(self, desired: IpvsState, keys: Iterable[ServerKey]) -> tuple[int, dict[ServerKey, str]]:
        """Write what differs of some servers; return the number of changes, and the words about each server refused."""
        graceful = self._drain_seconds != 0
        changes = diff_ipvs(keys, desired, self._kernel, self._draining, graceful=graceful)
        if not changes:
            return 0, {}
        words = self._port.apply(changes)
        refused: dict[ServerKey, str] = {}
        for change, said in zip(changes, words, strict=True):
            if said:
                refused.setdefault(change.key, f"{change}: {said}")
                continue
            self._note(change)
        for key in {change.key for change in changes} - refused.keys():
            if key in desired:
                self._kernel[key] = desired[key]
        return len(changes) - sum(map(bool, words)), refused

    def _note(self, change: IpvsChange) -> None:
        """Take a change that was done into account: the count, and what drains."""
        verb, key, real = change.verb, change.key, change.real
        if verb == "add server":
            self._add_to_count(key, 1)
        elif verb == "delete server":
            self._add_to_count(key, -1)
            self._kernel.pop(key, None)
            self._draining.pop(key, None)
        elif real is not None and verb == "set real" and real.weight == 0 and not self._is_wanted(key, real):
            self._drain(key, [real[:2]])
        elif real is not None and key in self._draining:
            self._draining[key].pop(real[:2], None)
            if not self._draining[key]:
                del self._draining[key]

    def _add_to_count(self, key: ServerKey, step: int) -> None:
        if key.family == 4 and self._count is not None:
            self._count += step

    def _is_wanted(self, key: ServerKey, real: RealServer) -> bool:
        want = (self._desired or {}).get(key)
        return want is not None and any(one[:2] == real[:2] for one in want.real_servers)

    # -- draining ----------------------------------------------------------------------------------------------------

    def _drain(self, key: ServerKey, reals: Iterable[RealKey]) -> None:
        now = self._clock()
        end = float("inf") if self._drain_seconds is None else now + self._drain_seconds
        if not self._draining:
            self._next_look = now + DRAIN_LOOK
        known = self._draining.setdefault(key, {})
        for real in reals:
            known.setdefault(real, end)

    def _is_look_due(self) -> bool:
        return bool(self._draining) and self._clock() >= self._next_look

    def _end_drained(self) -> int:
        """Delete real servers without connections, if a look is due; only their own virtual servers are asked."""
        if not self._is_look_due():
            return 0
        started = self._clock()
        idle: list[IpvsChange] = []
        for key, quiet in list(self._draining.items()):
            seen = {real[:2]: real for real in self._port.real_servers(key)}
            for real in list(quiet):
                found = seen.get(real)
                if found is None:
                    self._note(IpvsChange("delete real", key, None, RealServer(*real)))
                elif found.active + found.inactive == 0 or quiet[real] <= started:
                    idle.append(IpvsChange("delete real", key, None, RealServer(*real)))
        done = 0
        for change, said in zip(idle, self._port.apply(idle), strict=True):
            if not said:  # what is refused is asked again at the next look
                self._note(change)
                done += 1
        now = self._clock()
        self._next_look = now + max(DRAIN_LOOK, DRAIN_SHARE * (now - started))
        return done

    def _error_lines(self) -> tuple[str, ...]:
        lines = [self._errors[key] for key in sorted(self._errors)]
        more = len(lines) - SHOWN_ERRORS
        return tuple(lines[:SHOWN_ERRORS] + ([f"and {more} more virtual servers"] if more > 0 else []))
