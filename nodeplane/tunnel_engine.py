"""Who wraps packets of the UDP backend: the forwarder alone, or programs in the kernel with the forwarder behind them.

    Engine        the kernel can             it cannot
    auto          kernel                     userspace, and why
    kernel        kernel                     an error: it was asked for
    userspace     userspace                  userspace

What the kernel can is found out elsewhere; here is only what follows from it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from kernelstate.errors import MissingFeatureError
from kernelstate.features import Feature
from overlay.netconf import Engine


class Choice(NamedTuple):
    """The engine, and why it is that one."""

    engine: Literal["userspace", "kernel"]
    reason: str


def choose_engine(stated: Engine, missing: str) -> Choice:
    """Return the engine; ``missing`` says why the kernel cannot be one, empty if it can. Raises MissingFeatureError."""
    if stated == "userspace":
        return Choice("userspace", "Backend.Engine in the configuration")
    if not missing:
        return Choice("kernel", "Backend.Engine in the configuration" if stated == "kernel" else "the kernel runs its programs")
    if stated == "kernel":
        raise MissingFeatureError(Feature.TUNNEL_PROGRAMS, missing)
    return Choice("userspace", missing)
