"""In which order chunks are called, and what waits for what on the GPU's streams. CUDA is stood in for."""

import contextlib
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.moe import overlap
from lockstep.moe.overlap import Overlap, call_order, chunk_size


@given(st.integers(0, 20), st.booleans())
def test_each_part_of_each_chunk_is_called_once_and_after_what_it_needs(num_chunks, overlap):
    order = call_order(num_chunks, overlap)
    at = {call: number for number, call in enumerate(order)}
    assert len(at) == len(order) == 3 * num_chunks
    for chunk in range(num_chunks):
        assert at["dispatch", chunk] < at["experts", chunk] < at["combine", chunk]
        if chunk:
            assert all(at[part, chunk - 1] < at[part, chunk] for part in ("dispatch", "experts", "combine"))
            assert (at["dispatch", chunk] < at["combine", chunk - 1]) == overlap
    under_way = itertools.accumulate({"dispatch": 1, "experts": 0, "combine": -1}[part] for part, _ in order)
    assert max(under_way, default=0) <= 1 + overlap


def test_two_chunks_under_way_by_hand():
    calls = [f"{part[0].upper()}{chunk}" for part, chunk in call_order(4, True)]
    assert [call for call in calls if call[0] != "E"] == ["D0", "D1", "C0", "D2", "C1", "D3", "C2", "C3"]


@given(st.integers(1, 10000), st.integers(1, 5000), st.one_of(st.none(), st.integers(1, 5000)))
def test_chunks_are_of_about_one_length_and_never_above_the_limit(longest, limit, overlap_from):
    size = chunk_size(longest, limit, overlap_from)
    assert 1 <= size <= limit
    num_chunks = -(-longest // size)
    if overlap_from is not None and longest >= max(2, overlap_from):
        assert num_chunks == max(2, -(-longest // limit))
    else:
        assert num_chunks == -(-longest // limit)
    assert num_chunks < 2 or longest - (num_chunks - 1) * size > size - num_chunks


class Streams:
    """In the place of `torch.cuda`: writes down what each operation on each stream comes after."""

    def __init__(self):
        streams = self

        class Stream:
            def __init__(self, device=None, priority=0):
                self.priority, self.last = priority, frozenset()

            def run(self, name):
                streams.after[name] = self.last
                self.last |= {name}

            def record_event(self):
                return self.last

            def wait_event(self, event):
                self.last |= event

            def wait_stream(self, other):
                self.last |= other.last

        self.after, self.Stream, self.current = {}, Stream, Stream()
        self.current_stream = lambda: self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def cuda(monkeypatch):
    streams = Streams()
    monkeypatch.setattr(overlap.torch, "cuda", streams)
    return streams


@pytest.mark.parametrize("num_chunks", [2, 3, 7])
def test_what_waits_for_what(cuda, num_chunks):
    beside = Overlap(None, torch.device("cuda"))
    mine = cuda.current
    for step in range(2):
        mine.run(f"before {step}")
        with beside.step() as lane:
            for part, chunk in call_order(num_chunks, True):
                with lane(part, chunk):
                    cuda.current.run((step, part, chunk))
        assert cuda.current is mine
        mine.run(f"after {step}")
        after = cuda.after
        for chunk in range(num_chunks):
            assert f"before {step}" in after[step, "dispatch", chunk]  # the rows are there
            assert (step, "dispatch", chunk) in after[step, "experts", chunk]
            assert (step, "experts", chunk) in after[step, "combine", chunk]
            assert (step, "combine", chunk) in after[f"after {step}"]
            if chunk + 2 < num_chunks:
                # The channel is free, and so is the memory that the combine read.
                assert (step, "combine", chunk) in after[step, "dispatch", chunk + 2]
                assert (step, "combine", chunk) in after[step, "experts", chunk + 2]
            if chunk + 1 < num_chunks:
                # This is the overlap: neither waits for the other.
                assert (step, "experts", chunk) not in after[step, "dispatch", chunk + 1]
                assert (step, "dispatch", chunk + 1) not in after[step, "experts", chunk]
                assert (step, "combine", chunk) not in after[step, "experts", chunk + 1]
    # On the dispatcher's stream all comes one after another, in the order of the calls.
    calls = [(step, *call) for step in range(2) for call in call_order(num_chunks, True) if call[0] != "experts"]
    assert all(first in after[second] for first, second in itertools.pairwise(calls))


def test_after_an_error_the_streams_are_one_again(cuda):
    beside = Overlap(None, torch.device("cuda"))
    mine = cuda.current
    with pytest.raises(ValueError, match="broken"), beside.step() as lane:
        with lane("dispatch", 0):
            cuda.current.run("dispatch")
        raise ValueError("broken")
    mine.run("after")
    assert "dispatch" in cuda.after["after"]


def test_experts_leave_room_for_the_kernels_beside_them(monkeypatch, cuda):
    asked = []
    monkeypatch.setattr(torch._C, "_set_sm_carveout_experimental", asked.append, raising=False)
    monkeypatch.setattr(torch._C, "_get_sm_carveout_experimental", lambda: 3, raising=False)
    with Overlap(None, torch.device("cuda"), 16).step() as lane:
        with lane("dispatch", 0):
            assert asked == []
        with lane("experts", 0):
            assert asked == [16]
        assert asked == [16, 3]


def test_what_a_profile_says_of_the_overlap():
    path = Path(__file__).parents[2] / "benchmarks" / "bench_overlap.py"
    spec = importlib.util.spec_from_file_location("bench_overlap", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)

    def kernel(name, stream, start, end):
        return {"cat": "kernel", "name": name, "ts": start, "dur": end - start, "args": {"stream": stream}}

    events = [
        kernel("dispatch_kernel", 20, 0, 10),  # nothing beside it
        kernel("dispatch_kernel", 20, 10, 40),
        kernel("gather_kernel", 7, 12, 20),
        kernel("grouped", 7, 18, 30),  # begins before the one before it has ended
        kernel("combine_kernel", 20, 40, 50),
        kernel("grouped", 7, 49, 60),
        kernel("silu", 20, 41, 45),  # on the same stream
        {"cat": "gpu_memcpy", "name": "copy", "ts": 0, "dur": 100, "args": {"stream": 7}},
    ]
    assert bench.overlapping_us(events) == {
        "dispatch": {"kernels": 2, "us": 40, "beside_experts_us": 18},
        "combine": {"kernels": 1, "us": 10, "beside_experts_us": 1},
    }
