"""The first file system of a virtual machine, made in memory for each run: about 3 MB, in a few milliseconds.

    /init            netns-lab/vm/init: finds the host's file system, and makes it the root
    /bin/busybox     what runs init; static, from the host
    /modules/        kernel modules until then, and `order`, in which they are loaded
    /vm/inside       netns-lab/vm/inside: the first process after that
    /vm/command      the command to run, with its directory and environment, as a shell script

The format is "newc" of cpio(5); the kernel's Documentation/driver-api/early-userspace/buffer-format.rst has its grammar.
"""

from __future__ import annotations

import shlex
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from netnslab.vm_kernel import TREE, Kernel

BUSYBOX = Path("/bin/busybox")
SCRIPTS = TREE / "netns-lab" / "vm"
# What is needed until the host's modules can be seen; all others are loaded by the kernel on demand.
FIRST_MODULES = ("virtio_pci", "virtio_console", "virtiofs", "overlay")
FOLDERS = ("bin", "dev", "host", "modules", "proc", "root", "sys", "top", "vm")


def build(kernel: Kernel, command: str, settings: Mapping[str, str]) -> bytes:
    """Return the archive. ``command`` is a shell script; ``settings`` are the variables that ``init`` and ``inside`` read."""
    modules = kernel.module_files(FIRST_MODULES)
    entries = [entry(folder, stat.S_IFDIR | 0o755) for folder in FOLDERS]
    files = {
        "bin/busybox": BUSYBOX.read_bytes(),
        "init": (SCRIPTS / "init").read_bytes(),
        "vm/inside": (SCRIPTS / "inside").read_bytes(),
        "vm/command": command.encode(errors="surrogateescape"),
        "vm/settings": "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items()).encode(),
        "modules/order": "".join(f"/modules/{path.name}\n" for path in modules).encode(),
        **{f"modules/{path.name}": path.read_bytes() for path in modules},
    }
    entries += [entry(name, stat.S_IFREG | 0o755, data) for name, data in files.items()]
    return b"".join([*entries, entry("TRAILER!!!", 0)])


def entry(name: str, mode: int, data: bytes = b"") -> bytes:
    """Return one entry of the archive: a header of thirteen numbers, the name, the data, the last two padded to four bytes."""
    name_bytes = name.encode() + b"\0"
    #         inode mode uid gid links time size       device, twice  name            checksum (unused)
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name_bytes), 0)
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + name_bytes
    return _padded(head) + _padded(data)


def command_script(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    """Return a script that becomes a command in a directory, with exactly this environment."""
    variables = [f"{name}={value}" for name, value in sorted(environment.items())]
    return f"cd {shlex.quote(str(folder))} || exit 126\nexec env -i {shlex.join([*variables, *command])}\n"


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
