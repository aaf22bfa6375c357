import os

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says more about what else a machine does than about us. Under CI hypothesis draws the same
# examples every time, and that is kept.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Two files at a time, since half of the time of one is waiting; never more than the cores we may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2, cores)
