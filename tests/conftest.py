"""Settings of every test."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def quick_compilation():
    """Small arrays run for microseconds and compile for seconds: leave optimising out.

    Tests of memory and of whole commands run in processes of their own, without this.
    """
    jax.config.update("jax_disable_most_optimizations", True)
