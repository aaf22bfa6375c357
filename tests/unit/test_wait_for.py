"""Waiting for a collective in slices: what ends between two looks is told apart from what does not end."""

import pytest

from lockstep.coordination.waits import wait_for


class Work:
    """A collective that ends just after the first slice has ended, well or by its group's own limit."""

    def __init__(self, fails):
        self.fails, self.waits = fails, 0

    def wait(self, timeout=None):
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")
        if self.fails:
            raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting for recv")

    def is_completed(self):
        return True


def test_a_collective_that_ends_between_two_slices_has_ended():
    wait_for(Work(fails=False), timeout_s=10)


def test_a_collective_that_its_group_ended_is_a_timeout():
    with pytest.raises(TimeoutError, match="no answer within 10 s"):
        wait_for(Work(fails=True), timeout_s=10)
