"""Traffic between two pods, and the CPU time that it took wherever it was spent.

    pod a: load stream-out ----------- whatever is between them ----------> pod b: load stream-in
    CPU =  its own          + forwarders' (if any) + ksoftirqd's                  + its own

What the kernel does for a packet it does on the time of the process that sent it (a system call, or a softirq right after it)
or, when there is much of it, of ``ksoftirqd``. This kernel keeps both to the nanosecond (``/proc/PID/schedstat``), so the sum is
user, system and softirq time of the traffic, and other programs on the machine are not in it; how much those took is said apart.

The generator is ``load/load.c``, compiled on the spot.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from bench.overlay_rig import Rig
from kernelstate.linux import netns
from nodeplane.commands import Failed

T = TypeVar("T")

SOURCE = Path(__file__).parent / "load" / "load.c"
PORT = 5201
ATTEMPTS = 8
"""So often packets of full size are tried before it is said that they do not cross."""
SMALL = 64
"""Bytes of payload of a small packet."""
LONGEST = 30.0
"""Seconds until a run is given up; the generator itself gives up after ten without a packet."""
_IP_UDP = 28


class Stream(msgspec.Struct, frozen=True):
    """One TCP connection: bytes that arrived, nanoseconds from the first to the last, what was sent again, CPU nanoseconds.

    ``others``: how many CPUs the machine's other programs took meanwhile, on average.
    """

    bytes: int
    ns: int
    retransmits: int
    cpu: int
    others: float

    @property
    def gbits(self) -> float:
        """Throughput in Gbit/s."""
        return 8 * self.bytes / self.ns

    @property
    def cpu_per_gb(self) -> float:
        """CPU seconds for each 10^9 bytes."""
        return self.cpu / self.bytes


class Flood(msgspec.Struct, frozen=True):
    """Small packets as fast as they can be sent: how many were, how many arrived, within how many nanoseconds, CPU nanoseconds.

    ``receiving`` is the part of the CPU time that the receiver took. ``others`` as of a stream.
    """

    sent: int
    received: int
    ns: int
    cpu: int
    receiving: int
    others: float

    @property
    def kpps(self) -> float:
        """Thousands of packets that arrived each second."""
        return 1e6 * self.received / self.ns

    @property
    def carried(self) -> float:
        """Thousands of packets that arrived for each second of CPU time before the receiver.

        Where the sender carries each packet to the far pod by itself, this is ``kpps`` of a machine with nothing else to do.
        """
        return 1e6 * self.received / (self.cpu - self.receiving)

    @property
    def lost(self) -> float:
        """Percent that did not arrive."""
        return 100 * (1 - self.received / self.sent)

    @property
    def cpu_per_packet(self) -> float:
        """CPU microseconds for each that arrived."""
        return self.cpu / self.received / 1000


class Pings(msgspec.Struct, frozen=True):
    """Single packets to and fro: round trips, packets without an answer, and how long a trip took in nanoseconds."""

    rounds: int
    lost: int
    median: int
    p99: int


class Generator:
    """The compiled generator."""

    def __init__(self, program: Path) -> None:
        self._program = str(program)

    def stream(self, rig: Rig, milliseconds: int, forwarders: Sequence[int] = ()) -> Stream:
        """Send one TCP stream from pod to pod; ``forwarders`` are the processes on its way. Raises Failed."""
        sent, got, cpu, others = self._measured(rig, "stream", [str(milliseconds)], forwarders)
        if not got["bytes"]:
            raise Failed(f"{rig.a.pod} to {rig.b.pod_ip}: a TCP connection, but no data on it")
        return Stream(got["bytes"], got["ns"], sent["retransmits"], cpu, others)

    def flood(self, rig: Rig, milliseconds: int, forwarders: Sequence[int] = ()) -> Flood:
        """Send small UDP packets from pod to pod. Raises Failed, also if none arrives."""
        sent, got, cpu, others = self._measured(rig, "flood", [str(milliseconds), str(SMALL)], forwarders)
        if got["packets"] < 2:
            raise Failed(f"{rig.a.pod} to {rig.b.pod_ip}: {got['packets']} of {sent['packets']} UDP packets arrived")
        return Flood(sent["packets"], got["packets"], got["ns"], cpu, got["cpu"], others)

    def ping(self, rig: Rig, milliseconds: int, payload: int = SMALL) -> Pings:
        """Send one UDP packet at a time, each after the answer to the last. Raises Failed, also if none is answered."""
        sent, _ = self._run(rig, "ping", [str(milliseconds), str(payload)])
        if not sent["rounds"]:
            raise Failed(f"{rig.a.pod} to {rig.b.pod_ip}: no answer to {sent['lost']} packets of {payload} bytes")
        return Pings(sent["rounds"], sent["lost"], sent["median"], sent["p99"])

    def largest(self, rig: Rig, mtu: int) -> None:
        """Send packets of exactly ``mtu`` bytes to and fro that must not be fragmented. Raises Failed when they do not cross.

        Tried several times: on a machine with other work an answer may take longer than a packet is waited for.
        """
        for last in (False,) * (ATTEMPTS - 1) + (True,):
            try:
                self.ping(rig, 100, mtu - _IP_UDP)
            except Failed as error:
                if last or "no answer" not in str(error):
                    raise
            else:
                return

    def _measured(
        self, rig: Rig, kind: str, words: Sequence[str], forwarders: Sequence[int]
    ) -> tuple[dict[str, int], dict[str, int], int, float]:
        """Return what both ends say, the CPU nanoseconds of the traffic, and the CPUs that others took."""
        cpu, busy = cpu_of(forwarders), Busy.now()
        sent, got = self._run(rig, kind, words)
        cpu, everybody = cpu_of(forwarders) - cpu, Busy.now().since(busy)
        cpu += sent["cpu"] + got["cpu"]
        return sent, got, cpu, max(0.0, everybody.cpu - cpu / 1e9) / everybody.wall

    def _run(self, rig: Rig, kind: str, words: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
        """Start who listens, then who sends, and return what each has to say."""
        listen, send = ("echo", "ping") if kind == "ping" else (f"{kind}-in", f"{kind}-out")
        listener = self._start(rig.b.pod, [listen, str(PORT)])
        with listener, contextlib.ExitStack() as undo:
            undo.callback(listener.kill)
            assert listener.stdout is not None
            if listener.stdout.readline() != "ready\n":
                raise Failed(last_words(listener, f"load {listen}"))
            sender = self._start(rig.a.pod, [send, rig.b.pod_ip, str(PORT), *words])
            with sender:
                undo.callback(sender.kill)
                said = _answer(sender, f"load {send}")
            return said, _answer(listener, f"load {listen}")

    def _start(self, namespace: str, words: Sequence[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return netns.popen(namespace, [self._program, *words], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@contextlib.contextmanager
def open_generator() -> Iterator[Generator]:
    """Compile the generator; gone afterwards. Raises Failed."""
    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory:
        yield Generator(compile_c(SOURCE, Path(directory) / "load"))


def compile_c(source: Path, program: Path) -> Path:
    """Compile one C file with optimisation. Raises Failed with the compiler's words."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise Failed(f"{source.name}: a C compiler (cc) is needed to measure")
    command = [compiler, "-O2", "-Wall", "-pthread", "-o", str(program), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise Failed(f"{source.name}: {done.stderr.strip()}")
    return program


def quieter_half(runs: Sequence[T], others: Callable[[T], float]) -> list[T]:
    """Return the half of the runs, and the one in the middle, in which others took the least of the machine."""
    return sorted(runs, key=others)[: (len(runs) + 1) // 2]


def _answer(process: subprocess.Popen[str], what: str) -> dict[str, int]:
    """Let it end (its input ends here) and return what it said. Raises Failed."""
    try:
        out, err = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{what}: did not end within {LONGEST:g} s") from error
    if process.returncode:
        raise Failed(f"{what}: {err.strip() or f'ended with {process.returncode}'}")
    return msgspec.json.decode(out, type=dict[str, int])


def last_words(process: subprocess.Popen[str], what: str) -> str:
    """End a process that did not start as it should, and return what it said to stderr."""
    process.kill()
    _, err = process.communicate(timeout=LONGEST)
    return f"{what}: {err.strip() or 'ended without a word'}"


# -- CPU time ----------------------------------------------------------------------------------------------------------


def cpu_of(processes: Sequence[int]) -> int:
    """Return the CPU nanoseconds so far of processes with all their threads, and of the kernel's softirq threads."""
    return sum(_ran(task) for pid in (*processes, *_softirq_threads()) for task in Path(f"/proc/{pid}/task").iterdir())


def _ran(task: Path) -> int:
    return int((task / "schedstat").read_text().split()[0])


def _softirq_threads() -> list[int]:
    """Return the ids of ``ksoftirqd/N``: children of kthreadd, started early, so the first hundreds of ids hold them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if (entry / "comm").read_text().startswith("ksoftirqd/"):
                    found.append(int(entry.name))
    return found


class Busy(msgspec.Struct, frozen=True):
    """The machine at one moment: seconds on the clock, and CPU seconds that all programs together have taken."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Busy:
        """Look."""
        user, nice, system, _idle, _iowait, irq, softirq = (
            int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
        )
        return cls(time.monotonic(), (user + nice + system + irq + softirq) / 100)

    def since(self, before: Busy) -> Busy:
        """Return what has passed since another moment."""
        return Busy(self.wall - before.wall, self.cpu - before.cpu)
