import gc
import importlib.metadata
import os

# Before jax is imported: eight CPU devices, what the sharding tests need, and then
# compilation in haste, because tests ask what is computed, not how fast. It takes 113
# tests of tests/test_polar.py from 78 to 28 CPU seconds; each of the flags has a part.
# XLA ends the process at a flag that it does not know, as jaxlib 0.12 at the last one.
# Flags that are set outside stay: the last of two counts.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"
    " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith(("0.7.", "0.8.", "0.9.", "0.10."))
    + f" {os.environ.get('XLA_FLAGS', '')}"
)

import jax
import pytest

# Makers of golden numbers need what the tests do not (PyTorch).
# What users write is for a type checker, mistakes included.
collect_ignore_glob = ["data/*.py", "typed_use.py"]

# Tracing makes many objects that live long: with Python's thresholds a seventh of the
# time of tests is spent on looking through them.
gc.set_threshold(20_000, 50, 100)


@pytest.fixture
def x64():
    """Run a test in double precision."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
