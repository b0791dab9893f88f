"""The processes of a virtual machine, and their connections to us.

    this process ----------------------------- qemu-system-x86_64 -accel tcg ------------------.
     control, stdout, stderr, stdin <--socket pairs--> virtio-serial ports 1 to 4 of the guest |
     console                        <--socket pair---> its serial port: the kernel's words     |
     qemu, files                    <--pipes---------- standard errors of qemu and virtiofsd   |
                                                                                               |
    virtiofsd, in a chroot at / <--- vhost-user over an abstract socket ---- virtiofs "host" --'

Always TCG, qemu's own translator: it needs nothing of the host, counts instructions, and a KVM that is there does not always work.
The machine has no network card. Both processes die with the thread that started them (PR_SET_PDEATHSIG), however that ends, and
nothing of them is in the file system: no socket, no image, no process id. Leaves to others: what is said over the connections.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from netnslab.errors import LabError
from netnslab.vm_initrd import BUSYBOX
from netnslab.vm_kernel import Kernel, UnavailableError

QEMU = "qemu-system-x86_64"
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")  # Debian 12's, of qemu-system-common
PACKAGES = {"qemu-system-x86": QEMU, "qemu-system-common": str(VIRTIOFSD), "busybox-static": str(BUSYBOX)}
PORTS = ("control", "stdout", "stderr", "stdin")  # in the order of netns-lab/vm/inside: vport0p1 and on
# edd=off: the BIOS is not asked for disks, which saves a second. rdrand with trust_cpu: the kernel does not gather randomness first.
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 edd=off mitigations=off random.trust_cpu=on"
CPU = "Nehalem,+rdrand"  # x86-64-v2, which is what Debian's and PyPI's binaries ask for; each further extension costs start-up time


class Size(msgspec.Struct, frozen=True):
    """How big a machine is, and whether it counts.

    With ``icount`` one instruction takes one virtual nanosecond, and waiting takes none (qemu's invocation manual, -icount): the
    guest's clock then counts instructions, on one CPU, whatever the host does meanwhile.
    """

    cpus: int = 2
    memory_mb: int = 2048
    icount: bool = False


class Machine(msgspec.Struct, frozen=True):
    """A running machine: its qemu, and the file descriptors of its connections by name (see the drawing above)."""

    qemu: subprocess.Popen[bytes]
    reads: dict[str, int]
    stdin: socket.socket


def check_host() -> None:
    """Raise LabError naming the packages to install, UnavailableError where no package would do."""
    if platform.machine() != "x86_64":
        raise UnavailableError(
            f"the virtual machine runs this host's own programs, and is made for x86_64, not {platform.machine()}"
        )
    missing = [package for package, program in PACKAGES.items() if shutil.which(program) is None]
    if missing:
        raise LabError(
            f"the virtual machine needs Debian's {' '.join(missing)}: apt-get install --no-install-recommends {' '.join(missing)}"
        )


@contextmanager
def started(kernel: Kernel, initrd: bytes, size: Size, *, terminal: bool) -> Iterator[Machine]:
    """Start a machine; it is gone when the block is left. With ``terminal`` our own standard input and output are its hvc0."""
    with ExitStack() as undo:
        files_vhost, files_errors = _start_virtiofsd(undo)
        ends = {name: socket.socketpair() for name in (*PORTS, "console")}
        errors, errors_end = os.pipe()
        undo.callback(os.close, errors)
        image = os.memfd_create("initrd")
        with os.fdopen(image, "wb") as file:
            file.write(initrd)
            file.flush()
            theirs = {name: end.fileno() for name, (_, end) in ends.items()}
            qemu = subprocess.Popen(
                _until_we_die(
                    [QEMU, *_arguments(kernel, image, size, theirs | {"files": files_vhost.fileno()}, terminal=terminal)]
                ),
                stdin=None if terminal else subprocess.DEVNULL,
                stdout=None if terminal else subprocess.DEVNULL,
                stderr=errors_end,
                pass_fds=(image, files_vhost.fileno(), *theirs.values()),
            )
        undo.callback(_end, qemu)
        # Only qemu holds the other ends from here on, so that their end of file is its end.
        os.close(errors_end)
        files_vhost.close()
        for _, end in ends.values():
            end.close()
        ours = {name: undo.enter_context(end) for name, (end, _) in ends.items()}
        reads = {name: end.fileno() for name, end in ours.items() if name != "stdin"}
        yield Machine(qemu, reads | {"qemu": errors, "files": files_errors}, ours["stdin"])


def _start_virtiofsd(undo: ExitStack) -> tuple[socket.socket, int]:
    """Start the file server; return a connection to it for qemu, and its standard error."""
    listening = socket.socket(socket.AF_UNIX)
    errors, errors_end = os.pipe()
    undo.callback(os.close, errors)
    with listening:
        listening.bind("")  # autobind, unix(7): the kernel chooses a free abstract name
        listening.listen(1)
        connection = undo.enter_context(socket.socket(socket.AF_UNIX))
        connection.connect(listening.getsockname())  # first in the queue: nobody else's connection is ever accepted
        options = ["source=/", "sandbox=chroot", "cache=always", "log_level=warn"]
        served = subprocess.Popen(
            _until_we_die([str(VIRTIOFSD), f"--fd={listening.fileno()}", *(word for o in options for word in ("-o", o)), "-f"]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors_end,
            pass_fds=(listening.fileno(),),
        )
    os.close(errors_end)
    undo.callback(_end, served)
    return connection, errors


def _arguments(kernel: Kernel, initrd: int, size: Size, fds: dict[str, int], *, terminal: bool) -> list[str]:
    memory = f"{size.memory_mb}M"
    arguments = ["-accel", "tcg", "-machine", "q35", "-cpu", CPU, "-smp", str(1 if size.icount else size.cpus), "-m", memory]
    # Shared memory, because virtiofsd reads and writes the guest's directly.
    arguments += ["-object", f"memory-backend-memfd,id=memory,size={memory},share=on", "-numa", "node,memdev=memory"]
    arguments += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    arguments += ["-icount", "shift=0,sleep=off"] if size.icount else []
    arguments += ["-kernel", str(kernel.image), "-initrd", f"/proc/self/fd/{initrd}", "-append", KERNEL_ARGUMENTS]
    for name, fd in fds.items():
        arguments += ["-chardev", f"socket,id={name},fd={fd}"]
    arguments += [
        "-serial",
        "chardev:console",
        "-device",
        "vhost-user-fs-pci,chardev=files,tag=host",
        "-device",
        "virtio-serial-pci",
    ]
    for number, name in enumerate(PORTS, start=1):
        arguments += ["-device", f"virtserialport,nr={number},chardev={name},name={name}"]
    if terminal:  # mux: Ctrl-A x ends the machine, whatever the guest does. signal=off: Ctrl-C is the guest's
        arguments += ["-chardev", "stdio,id=terminal,mux=on,signal=off", "-device", "virtconsole,chardev=terminal"]
    return arguments


def _until_we_die(command: list[str]) -> list[str]:
    return ["setpriv", "--pdeathsig", "KILL", *command]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
