"""The kernel a virtual machine boots: Debian's cloud kernel, fetched once by apt and unpacked, never installed.

    linux-image-cloud-amd64 --depends on--> linux-image-6.1.0-N-cloud-amd64 --apt-get download, dpkg-deb -x-->
    build/vm/6.1.0-N-cloud-amd64/vmlinuz
                                 lib/modules/6.1.0-N-cloud-amd64/   with modules.dep

apt checks the package's signature. Which version is newest is asked of apt when there is none yet; after that nothing is asked
any more, until somebody removes the folder. Leaves to others: booting it (``vm_qemu``).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from netnslab.errors import LabError

META_PACKAGE = "linux-image-cloud-amd64"
TREE = Path(__file__).resolve().parents[2]
CACHE = TREE / "build" / "vm"
APT_SECONDS = 300


class UnavailableError(LabError):
    """The machine cannot be had here at all, and no package in packages.txt would change it: which part, and why."""


class Kernel(msgspec.Struct, frozen=True):
    """One unpacked kernel: its ``uname -r``, and the folder that holds it."""

    release: str
    folder: Path

    @property
    def image(self) -> Path:
        """The file to boot."""
        return self.folder / "vmlinuz"

    @property
    def modules(self) -> Path:
        """The folder that belongs at /lib/modules/RELEASE."""
        return self.folder / "lib" / "modules" / self.release

    def module_files(self, wanted: Sequence[str]) -> list[Path]:
        """Return the files of these modules and of what they need, each after all that it needs. Raises LabError."""
        needs: dict[str, list[str]] = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            path, _, rest = line.partition(":")
            needs[path] = rest.split()  # modules.dep(5): the nearest first, all of them and not only direct ones
        by_name = {Path(path).stem.replace("-", "_"): path for path in needs}
        order: dict[str, None] = {}
        for name in wanted:
            if name not in by_name:
                raise LabError(f"kernel {self.release} has no module {name}")
            path = by_name[name]
            order.update(dict.fromkeys([*reversed(needs[path]), path]))
        return [self.modules / path for path in order]


def cached(cache: Path = CACHE) -> Kernel | None:
    """Return the kernel that is there, the last fetched if there are several, or None."""
    found = [image.parent for image in cache.glob("*/vmlinuz")]
    if not found:
        return None
    newest = max(found, key=lambda folder: folder.stat().st_mtime)
    return Kernel(newest.name, newest)


def fetch(cache: Path = CACHE) -> Kernel:
    """Return the kernel that is there, or download and unpack the newest. Raises UnavailableError with apt's own words.

    Several processes may do so at once: each unpacks beside the place, and the first moves its folder there.
    """
    if (there := cached(cache)) is not None:
        return there
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        work = Path(scratch)
        # Without root there is no user _apt to change to, and with root that user may not write here.
        _run(["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", _newest_package()], work)
        (package,) = work.glob("*.deb")
        _run(["dpkg-deb", "-x", str(package), "unpacked"], work)
        made = _arrange(work / "unpacked", work / "kernel")
        with contextlib.suppress(OSError):  # ENOTEMPTY: another process was first, and its folder holds the same
            made.folder.rename(cache / made.release)
    return Kernel(made.release, cache / made.release)


def _newest_package() -> str:
    """Ask apt on which package the meta package depends; its lists are renewed first where it knows of none."""
    for renew in (False, True):
        if renew:
            _run(["apt-get", "update", "-qq"], Path("/"))
        told = subprocess.run(
            ["apt-cache", "depends", META_PACKAGE],
            capture_output=True,
            text=True,
            check=False,
            timeout=APT_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
        for line in told.stdout.splitlines():
            word, _, name = line.strip().partition(": ")
            if word == "Depends" and name.startswith("linux-image-"):
                return name
    raise UnavailableError(f"apt knows no package {META_PACKAGE}: its sources are not those of a Debian for amd64")


def _arrange(unpacked: Path, folder: Path) -> Kernel:
    """Keep of a package the image and the modules, and write the modules' index, which the package leaves to its installation."""
    (image,) = (unpacked / "boot").glob("vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    (folder / "lib").mkdir(parents=True)
    (unpacked / "lib" / "modules").rename(folder / "lib" / "modules")
    _run(["depmod", "-b", str(folder), release], folder)
    image.rename(folder / "vmlinuz")
    return Kernel(release, folder)


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=APT_SECONDS)
    except FileNotFoundError as error:
        raise UnavailableError(f"a kernel for the virtual machine needs {command[0]}, which is not here") from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{' '.join(command)}: no answer in {APT_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        words = (error.stderr or error.stdout or "").strip().splitlines()
        raise UnavailableError(f"{' '.join(command)}: {words[-1] if words else error.returncode}") from error
