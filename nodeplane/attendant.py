"""Who watches the agent at work: metrics, the servers that tell of it, systemd, the API server's Events.

    agent:  taken(update) --> sync --> synced(round)        turn() at every turn of its loop, once a second at least

An attendant never waits and never fails: it is called from the agent's thread, between a change and the kernel. What goes wrong with
its own business it says in ``problems``, which people see, and which make nobody think that Services are not kept up to date.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from clusterstate.snapshot import Update
from kernelstate.ports import SyncReport
from nodeplane.pipeline import Desired
from nodeplane.status import Status


class Round(msgspec.Struct, frozen=True):
    """What one write to the kernel did."""

    seconds: float
    reports: tuple[SyncReport, ...]
    errors: tuple[str, ...]
    """All of them, those of the host and of health check ports too."""
    full: bool
    """Whether everything was compared with the kernel."""
    status: Status


class Attendant:
    """Does nothing; whoever watches overrides what it wants to hear."""

    def taken(self, update: Update, desired: Desired) -> None:
        """Hear that an update was compiled and is about to be written."""

    def synced(self, made: Round) -> None:
        """Hear what a write did."""

    def turn(self) -> None:
        """Hear that the loop goes round."""

    def problems(self) -> Sequence[str]:
        """Return what is wrong with one's own business, one line each."""
        return ()
