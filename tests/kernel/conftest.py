"""Network namespaces for the kernel tests: unique names, gone after the test whatever happened in it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from kernelstate.linux import netns as namespaces


@pytest.fixture
def make_netns() -> Iterator[Callable[[], str]]:
    """Make any number of namespaces, each with its loopback up; call it for a new name."""
    with ExitStack() as undo:

        def make() -> str:
            name = f"np-t-{os.getpid()}-{secrets.token_hex(3)}"
            namespaces.create(name)
            undo.callback(namespaces.delete, name)
            return name

        yield make


@pytest.fixture
def netns(make_netns: Callable[[], str]) -> str:
    """Return the name of one fresh namespace; ``kernelstate.linux.netns.inside(netns)`` and ``run(netns, ...)`` use it."""
    return make_netns()


@pytest.fixture
def in_netns(netns: str) -> Iterator[str]:
    """Run the test itself inside a fresh namespace; yields its name."""
    with namespaces.inside(netns):
        yield netns
