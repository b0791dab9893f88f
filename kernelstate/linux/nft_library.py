"""libnftables through its own Python binding, and its complaints as errors. Debian's python3-nftables; nobody else needs it.

A context holds a socket, so it belongs to the network namespace in which it was made.

Source: libnftables(3), nftables.py of the binding.
"""

from __future__ import annotations

import ctypes
import re
from importlib.util import find_spec
from typing import Any

from kernelstate.errors import KernelRefusedError, MissingFeatureError
from kernelstate.features import Feature

LARGE = 1 << 20
"""Bytes of text. What libnftables took for a larger one is given back to the system."""

_libc = ctypes.CDLL(None)


def has_library() -> bool:
    """Whether the binding is installed."""
    return find_spec("nftables") is not None


class Library:
    """One context in the current network namespace. Raises MissingFeatureError."""

    def __init__(self) -> None:
        try:
            import nftables  # noqa: PLC0415  only this mode needs it

            self._context: Any = nftables.Nftables()
        except (ImportError, OSError) as error:
            raise MissingFeatureError(Feature.NFTABLES, f"libnftables' Python binding (python3-nftables): {error}") from error

    def run(self, text: str) -> None:
        """Do all commands in one transaction. Raises KernelRefusedError with the line and the library's words."""
        code, _, complaint = self._context.cmd(text)
        if len(text) > LARGE:
            _libc.malloc_trim(0)
        if code != 0:
            raise refusal(text, complaint)


def refusal(text: str, complaint: str) -> KernelRefusedError:
    """Turn a complaint into an error: its first words, and the line of ``text`` that it quotes, if it quotes one.

    The line is a hint: what the kernel finds wrong at the end of a transaction is blamed on some line before.
    """
    first, *quoted = complaint.splitlines() or ["refused without a word"]
    words = re.sub(r"^(\S+: )?Error: ", "", first).strip()
    lines = text.splitlines()
    line = lines.index(quoted[0]) + 1 if quoted and quoted[0] in lines else 0
    return KernelRefusedError("nft", lines[line - 1][:300] if line else "transaction", words, line)
