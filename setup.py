"""The part of the installation that is not Python: `make -C packetpath all` leaves programs and BPF objects in packetpath/built/.

Everything else is in pyproject.toml. An editable installation builds as well: what is installed is then this very tree.
"""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKETPATH = Path(__file__).resolve().parent / "packetpath"


class BuildWithC(build_py):
    """Build the C before the files to install are listed, so that what it made is among them."""

    def run(self) -> None:
        """Run make, then do as always. A compiler that is missing is an error: without the programs there is no tunnel."""
        if (PACKETPATH / "Makefile").exists():
            subprocess.run(["make", "-C", str(PACKETPATH), "all"], check=True)
        super().run()


setup(cmdclass={"build_py": BuildWithC})
