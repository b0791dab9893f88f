"""The one place that starts, finds, replaces and ends the forwarder, the process behind the TUN of this network namespace.

                     .-- control socket --.
    agent ---------->|  forwarder.sock    |---- forwarder (own session, outlives the agent) ==== queues of flannel0, UDP sockets
      |  pidfd       '--------------------'         |
      '---- readable once it ended                  '-- take-over --> a newer forwarder gets queues, sockets, table; this one ends

Nobody but us starts one, under a lock, so there are never two. Which program a running one is, is a hash in its environment;
for which tunnel, is on its command line. One that does not answer is killed: it may forward, but nobody could tell it of peers.

Which peers it should know is for ``reconcile_forwarder.py``, whose ``ForwarderPort`` this implements.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kernelstate.errors import KernelRefusedError, KernelStateError, MissingFeatureError
from kernelstate.features import Feature
from kernelstate.linux import processes
from kernelstate.linux.forwarder_control import Control
from kernelstate.objects.tunnel import TunnelPeer, UdpTunnel
from kernelstate.reconcile_forwarder import PeerChange
from kernelstate.text.udp_tunnel import forwarder_words, peer_line

RUN_DIR = Path("/run/nodeplane")
IDENTITY = "NODEPLANE_FORWARDER"
"""Environment variable: the hash of the program that runs."""
START_SECONDS = 5.0
POLL = 0.005
MAX_LOG = 1 << 20
"""Bytes after which a log is begun anew."""
_DEFAULT_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
"""What an agent ignores or catches, and a forwarder must not inherit as ignored."""


class _ElsewhereError(KernelRefusedError):
    """Somebody else's forwarder."""


class LinuxForwarder:
    """The forwarder of the network namespace it is used in; its socket, lock and log lie in ``directory``."""

    def __init__(self, program: Path, directory: Path = RUN_DIR, queues: int = 0) -> None:
        """``queues`` 0: as many as the forwarder thinks right."""
        self._program, self._directory, self._queues = program, directory, queues
        self.socket, self.log = directory / "forwarder.sock", directory / "forwarder.log"
        self._lock = directory / "forwarder.lock"
        self._port = 0
        self._pid = 0
        self._watch = -1
        """A pidfd of the process that was ensured last."""
        self._epoll = select.epoll()

    def fileno(self) -> int:
        """Return a descriptor that is readable once the process has ended."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Let go of the process, which goes on."""
        self._let_go()
        self._epoll.close()

    # -- ForwarderPort -----------------------------------------------------------------------------------------------

    def ensure(self, tunnel: UdpTunnel) -> bool:
        """Let exactly one process run, of this program and for this tunnel; True unless one was kept."""
        try:
            identity = hashlib.sha256(self._program.read_bytes()).hexdigest()
        except OSError as error:
            raise MissingFeatureError(Feature.UDP_FORWARDER, f"{self._program}: {error.strerror}") from error
        arguments = self._arguments(tunnel)
        with self._locked():
            found = running = self._find()
            if running and processes.command_line(running)[-len(arguments) :] != arguments:
                # What it holds is bound to another port or address, so there is nothing to take over.
                processes.end(running, self._ask_to_stop)
                running = 0
            if not running:
                self._end_strays()
                running = self._start(arguments, identity)
            elif processes.environment(running, IDENTITY) != identity:
                running = self._replace(running, arguments, identity)
            self._port = tunnel.port
            self._hold(running)
            return running != found

    def peers(self) -> tuple[TunnelPeer, ...]:
        """Return its table, sorted."""
        with self._control("show peers") as control:
            return tuple(sorted(control.peers()))

    def replace(self, peers: Sequence[TunnelPeer]) -> None:
        """Exchange the whole table at once."""
        with self._control("replace peers") as control:
            control.replace(peers, self._port)

    def apply(self, changes: Sequence[PeerChange]) -> list[str]:
        """Do each in a message of its own, so that each has its own answer."""
        answers = []
        with self._control("set peers") as control:
            for change in changes:
                line = f"forget {change.peer.prefix}" if change.gone else peer_line(change.peer, self._port)
                try:
                    control.ask([line])
                    answers.append("")
                except KernelRefusedError as error:
                    answers.append(error.reason)
        return answers

    def is_alive(self) -> bool:
        """Whether the process of the last ``ensure`` still runs."""
        if self._watch >= 0 and processes.has_ended(self._watch, 0):
            self._let_go()
        return self._watch >= 0

    def stop(self) -> bool:
        """End whichever process runs, and remove what it leaves."""
        if not (self.socket.exists() or self._lock.exists()):
            return False
        with self._locked():
            try:
                running = self._find()
            except _ElsewhereError:
                return False
            if running:
                processes.end(running, self._ask_to_stop)
            strays = self._end_strays()
            self._let_go()
            for file in (self.socket, self.log, self._lock):
                file.unlink(missing_ok=True)
        return bool(running) or strays

    def counters(self) -> dict[str, int]:
        """Return its counters by name. Raises KernelStateError."""
        with self._control("show counters") as control:
            return {name: int(value) for name, value in control.values("show counters").items() if value.isdigit()}

    # -- which process -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep everybody else from starting or ending one meanwhile."""
        self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise KernelRefusedError("lock", str(self._lock), "somebody else is about to start a forwarder") from error
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _control(self, operation: str) -> Iterator[Control]:
        try:
            with Control(self.socket) as control:
                yield control
        except OSError as error:
            raise KernelRefusedError(operation, "forwarder", error.strerror or str(error)) from error

    def _find(self) -> int:
        """Return the pid of the process that listens on the socket, 0 if none does; one that does not answer is ended."""
        try:
            with Control(self.socket) as control:
                if not processes.shares_network(control.listener):
                    raise _ElsewhereError("use", str(self.socket), "a forwarder of another network namespace listens there")
                try:
                    return int(control.values("show version")["pid"])
                except (OSError, ValueError, KeyError, KernelRefusedError):
                    processes.kill(control.listener)
                    return 0
        except (FileNotFoundError, ConnectionError):
            return 0
        except OSError as error:
            raise KernelRefusedError("connect", str(self.socket), error.strerror or str(error)) from error

    def _ask_to_stop(self) -> None:
        with contextlib.suppress(OSError, KernelStateError), Control(self.socket) as control:
            control.ask(["stop"])

    def _end_strays(self) -> bool:
        """End a process of ours that runs without its socket, which somebody deleted; return whether there was one."""
        try:
            pid = int(self._lock.read_text() or "0")
        except (OSError, ValueError):
            return False
        if not pid or not processes.environment(pid, IDENTITY) or str(self.socket) not in processes.command_line(pid):
            return False
        processes.kill(pid)
        return True

    def _arguments(self, tunnel: UdpTunnel) -> list[str]:
        queues = ["--queues", str(self._queues)] if self._queues else []
        return [*forwarder_words(tunnel), *queues, "--control", str(self.socket)]

    # -- starting and replacing --------------------------------------------------------------------------------------

    def _start(self, arguments: list[str], identity: str) -> int:
        self.socket.unlink(missing_ok=True)
        pid = self._spawn(arguments, identity)
        self._await(pid)
        return pid

    def _replace(self, old: int, arguments: list[str], identity: str) -> int:
        """Let a newer program take over from the old one, which stays if that fails."""
        pid = self._spawn(["--take-over", *arguments], identity)
        self._await(pid)
        processes.end(old, lambda: None, patience=START_SECONDS)
        return pid

    def _spawn(self, arguments: list[str], identity: str) -> int:
        fresh = os.O_TRUNC if self.log.exists() and self.log.stat().st_size > MAX_LOG else 0
        try:
            pid = os.posix_spawn(
                self._program,
                [str(self._program), *arguments],
                {"PATH": os.environ.get("PATH", os.defpath), IDENTITY: identity},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 2, str(self.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND | fresh, 0o644),
                ],
                setsid=True,
                setsigmask=[],
                setsigdef=_DEFAULT_SIGNALS,
            )
        except OSError as error:
            raise KernelRefusedError("start", str(self._program), error.strerror or str(error)) from error
        self._lock.write_text(str(pid))
        return pid

    def _await(self, pid: int) -> None:
        """Wait until a process that was just started answers on the socket. Raises KernelRefusedError with its last words."""
        watch = os.pidfd_open(pid)
        end = time.monotonic() + START_SECONDS
        try:
            while time.monotonic() < end:
                with contextlib.suppress(OSError, KernelStateError), Control(self.socket) as control:
                    if control.values("show version").get("pid") == str(pid):
                        return
                if processes.has_ended(watch, POLL):
                    raise KernelRefusedError("start", str(self._program), self._last_words())
            processes.kill(pid)
            raise KernelRefusedError("start", str(self._program), f"does not answer after {START_SECONDS:g} s")
        finally:
            os.close(watch)

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return lines[-1] if lines else "ended at once and said nothing"

    # -- the one that is watched -------------------------------------------------------------------------------------

    def _hold(self, pid: int) -> None:
        """Watch a process from now on."""
        if pid == self._pid and self.is_alive():
            return
        self._let_go()
        try:
            self._watch = os.pidfd_open(pid)
        except OSError as error:
            raise KernelRefusedError("watch", f"forwarder {pid}", error.strerror or str(error)) from error
        self._epoll.register(self._watch, select.EPOLLIN)
        self._pid = pid

    def _let_go(self) -> None:
        if self._watch >= 0:
            self._epoll.unregister(self._watch)
            os.close(self._watch)
        self._watch, self._pid = -1, 0
