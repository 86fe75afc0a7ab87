import os

# Eight CPU devices, before jax is imported: what the sharding tests need.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest

# Makers of golden numbers need what the tests do not (PyTorch).
collect_ignore_glob = ["data/*.py"]


@pytest.fixture
def x64():
    """Run a test in double precision."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
