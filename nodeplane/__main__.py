"""The command line. Each command is a module; this one only says which, and turns exceptions into exit codes.

Exit 0: done. 1: the answer is no, or the work failed. 2: bad usage or bad input, one line on stderr.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from nodeplane.commands import Failed, Usage, add_commands


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="nodeplane",
        description="A Kubernetes node's network dataplane: Services, pod overlay, NetworkPolicy.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nodeplane {version('nodeplane')}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log more, to stderr")
    add_commands(parser.add_subparsers(dest="command", metavar="COMMAND", required=True))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = make_parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        return int(args.run(args) or 0)
    except Usage as error:
        print(f"nodeplane: {error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"nodeplane: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader had enough; so has the interpreter's flush
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
