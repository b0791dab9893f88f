"""Running a command in a virtual machine whose kernel has what the host's may lack: IPVS, dummy links, netem, kernel modules.

    netns-lab/vm/run .venv/bin/nodeplane lab up        from a shell
    vm.run([".venv/bin/python", "-m", "pytest"])       from Python

The command sees the host's file system where it is, so a tree, its virtual environment and the system's programs are the same inside.
What it writes goes to memory. Decides how the two sides talk, how long is waited, and what is told when it fails; ``vm_qemu`` has
the processes, ``vm_kernel`` the kernel, ``vm_initrd`` the first file system.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from kernelstate.linux.ipvs import has_ipvs
from netnslab import vm_initrd, vm_kernel, vm_qemu
from netnslab.errors import LabError
from netnslab.vm_qemu import Machine, Size

BOOT_SECONDS = 120.0  # usually five; a machine under load takes longer
COMMAND_SECONDS = 600.0
WORDS_SHOWN = 30  # lines of the kernel and of qemu in an error

Listener: TypeAlias = Callable[[str, bytes], None]
"""Hears output as it comes: ``stdout`` or ``stderr``, and some bytes."""


class Result(msgspec.Struct, frozen=True):
    """How a command ended. ``console`` is what the guest's kernel said; seconds are wall-clock time."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    console: str
    boot_seconds: float
    command_seconds: float


def run(
    command: Sequence[str],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    size: Size | None = None,
    icount: bool = False,
    timeout: float = COMMAND_SECONDS,
    listener: Listener | None = None,
    stdin: int | None = None,
    terminal: bool = False,
) -> Result:
    """Boot a machine, run a command in it as root, and take the machine away.

    ``folder`` and ``environment`` are this process's own unless given; ``stdin`` is a file descriptor to pass on, nothing if None.
    ``terminal``: standard input and output are this process's terminal, and the result holds no output. ``icount``: see ``Size``.
    Raises UnavailableError if no machine can be had here, LabError if a package is missing, the machine does not come up or goes
    away, or the command takes more than ``timeout`` seconds. The command's own failure is no error, but an exit code.
    """
    vm_qemu.check_host()
    kernel = vm_kernel.fetch()
    size = Size(icount=icount) if size is None else size
    inside = dict(os.environ if environment is None else environment)
    inside.pop(
        "PYTHONDONTWRITEBYTECODE", None
    )  # bytecode goes to memory there, and compiling takes twenty times as long as here
    settings = {
        "MODULES": str(kernel.modules),
        "TERMINAL": "{1} {0}".format(*os.get_terminal_size()) if terminal else "",
        "INPUT": "" if stdin is None else "yes",
    }
    script = vm_initrd.command_script(command, folder or Path.cwd(), inside)
    initrd = vm_initrd.build(kernel, script, settings)
    with vm_qemu.started(kernel, initrd, size, terminal=terminal) as machine:
        return _Conversation(machine, listener, stdin).hold(timeout)


class _Conversation:
    """What is heard from one machine until its command has ended."""

    def __init__(self, machine: Machine, listener: Listener | None, stdin: int | None) -> None:
        self._machine = machine
        self._listener = listener
        self._stdin = stdin
        self._heard = {name: bytearray() for name in machine.reads}

    def hold(self, timeout: float) -> Result:
        """Listen until the command has ended. Raises LabError."""
        booting = time.monotonic()
        self._listen_until(b"started\n", BOOT_SECONDS, "to boot")
        running = time.monotonic()
        _pass_on(self._stdin, self._machine.stdin)
        self._listen_until(b"exit ", timeout, "to run the command")
        ended = time.monotonic()
        self._machine.qemu.kill()  # the guest has written everything before it said so, and has nothing to save
        for name in ("stdout", "stderr"):
            while self._hear(name):
                pass
        code = int(self._heard["control"].split()[-1])
        out, err = bytes(self._heard["stdout"]), bytes(self._heard["stderr"])
        return Result(code, out, err, self._heard["console"].decode(errors="replace"), running - booting, ended - running)

    def _listen_until(self, word: bytes, seconds: float, purpose: str) -> None:
        """Hear everything until a whole line with this beginning has come from the guest's first process."""
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for name, fd in self._machine.reads.items():
                selector.register(fd, selectors.EVENT_READ, name)
            while not (word in self._heard["control"] and self._heard["control"].endswith(b"\n")):
                events = selector.select(max(0.0, end - time.monotonic()))
                if not events:
                    raise LabError(f"the virtual machine took more than {seconds:g} s {purpose}{self._last_words()}")
                for key, _ in events:
                    if not self._hear(key.data):  # each connection is open as long as the process at its other end lives
                        raise LabError(f"the virtual machine ended while it had {purpose}{self._last_words()}")

    def _hear(self, name: str) -> bytes:
        data = os.read(self._machine.reads[name], 1 << 16)
        self._heard[name] += data
        if data and self._listener is not None and name in {"stdout", "stderr"}:
            self._listener(name, data)
        return data

    def _last_words(self) -> str:
        parts = [f"{name}: {line}" for name in ("console", "qemu", "files") for line in self._lines(name)]
        return "".join("\n  " + part for part in parts)

    def _lines(self, name: str) -> list[str]:
        return self._heard[name].decode(errors="replace").splitlines()[-WORDS_SHOWN:]


def _pass_on(source: int | None, target: socket.socket) -> None:
    """Copy standard input into the machine, until it ends, beside everything else; the end of the file is passed on too."""

    def copy() -> None:
        with target, contextlib.suppress(OSError):  # the machine ended first
            while source is not None and (data := os.read(source, 1 << 16)):
                target.sendall(data)

    threading.Thread(target=copy, name="standard input of the virtual machine", daemon=True).start()


@contextlib.contextmanager
def _terminal_kept() -> Iterator[None]:
    """Restore the terminal's modes afterwards: qemu does so itself, but not when it is killed."""
    before = termios.tcgetattr(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _print(stream: str, data: bytes) -> None:
    target = sys.stdout.buffer if stream == "stdout" else sys.stderr.buffer
    target.write(data)
    target.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``netns-lab/vm/run``: returns the command's exit code, or 1 if the machine failed."""
    parser = argparse.ArgumentParser(
        prog="netns-lab/vm/run", description="run a command in a virtual machine whose kernel has IPVS"
    )
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds the command may take (default: an hour)")
    parser.add_argument("--memory", type=int, default=Size().memory_mb, help="MB of memory (default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=Size().cpus, help="CPUs (default: %(default)s)")
    parser.add_argument("--icount", action="store_true", help="one CPU, whose clock counts instructions: 1 ns each")
    parser.add_argument("--fetch", action="store_true", help="only get the kernel, if this host's own has no IPVS")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command; a shell if there is none")
    given = parser.parse_args(arguments)
    try:
        if given.fetch:
            print("this host's kernel has IPVS" if has_ipvs() else vm_kernel.fetch().image)
            return 0
        size = Size(cpus=given.cpus, memory_mb=given.memory, icount=given.icount)
        command = given.command[given.command[:1] == ["--"] :]
        return _run_for_a_person(command or ["bash"], size, given.timeout)
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run_for_a_person(command: Sequence[str], size: Size, timeout: float) -> int:
    if os.isatty(0) and os.isatty(1):
        with _terminal_kept():
            return run(command, size=size, timeout=timeout, terminal=True).exit_code
    return run(command, size=size, timeout=timeout, listener=_print, stdin=0).exit_code


if __name__ == "__main__":
    sys.exit(main())
