"""What holds for every test.

Hypothesis tries the same examples in each run, unless it is told to look for new ones. Tests of IPVS run in a virtual machine where the
kernel has none.
"""

import os

import elsewhere
import pytest
from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("explore" if os.environ.get("EXPLORE") else "same")


def pytest_configure(config: pytest.Config) -> None:
    """Register what is wider than a fixture."""
    elsewhere.configure(config)
