"""What can go wrong between us and the kernel: three exception types, by whose fault it is."""

from __future__ import annotations


class KernelStateError(Exception):
    """Root of everything this package raises on purpose."""


class MissingFeatureError(KernelStateError):
    """This kernel or this host lacks something; ``feature`` names it as the probe does."""

    def __init__(self, feature: str, detail: str = "") -> None:
        self.feature, self.detail = feature, detail
        super().__init__(f"{feature} is not available here" + (f": {detail}" if detail else ""))


class KernelRefusedError(KernelStateError):
    """The kernel said no: which operation, on which object, and the kernel's own words.

    ``line`` is the 1-based line of the text that was refused, where a text was given and the tool named one, else 0.
    """

    def __init__(self, operation: str, obj: str, reason: str, line: int = 0) -> None:
        self.operation, self.obj, self.reason, self.line = operation, obj, reason, line
        super().__init__(f"{operation} {obj}: {reason}")


class ParseError(KernelStateError):
    """Text from a native tool that we cannot read: ``line`` is the offending one."""

    def __init__(self, line: str, reason: str) -> None:
        self.line, self.reason = line, reason
        super().__init__(f"cannot parse {line!r}: {reason}")
