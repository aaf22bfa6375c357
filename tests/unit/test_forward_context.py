"""The step that a thread is running, as layers deep inside a model see it."""

import threading

import pytest

from lockstep.metadata.chunks import ChunkPlan
from lockstep.metadata.dp_metadata import DPMetadata
from lockstep.metadata.forward_context import ForwardContext, get_forward_context, set_forward_context


def test_outside_a_step_the_error_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"no forward context is set.*lockstep\.join"):
        get_forward_context()


def test_a_bare_metadata_becomes_a_context():
    metadata = DPMetadata(5, [5, 2])
    with set_forward_context(metadata) as context:
        assert get_forward_context() is context
        assert context == ForwardContext(metadata, None, 0)


def test_contexts_nest_and_give_the_outer_one_back_also_after_an_exception():
    outer = ForwardContext(DPMetadata(5, [5, 2]), ChunkPlan([5, 2]), step=3)
    with set_forward_context(outer):
        with pytest.raises(KeyError), set_forward_context(DPMetadata(1, [1])):
            raise KeyError
        assert get_forward_context() is outer
    with pytest.raises(RuntimeError):
        get_forward_context()


def test_another_thread_does_not_see_it():
    seen = []

    def look():
        try:
            seen.append(get_forward_context())
        except RuntimeError:
            seen.append(None)

    with set_forward_context(DPMetadata(1, [1])):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [None]
