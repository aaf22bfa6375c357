import array
import collections
import copy
import dataclasses
import enum
import fractions
import gc
import math
import pickle
import threading
import warnings
import weakref
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lockstep import ConfigurationError, DPMetadata, ParallelConfig, TokenCountError
from lockstep.metadata.contexts import SizesContext


def make(counts, rank=0):
    return DPMetadata.make(
        ParallelConfig(data_parallel_size=len(counts), data_parallel_rank=rank), counts[rank], counts
    )


# Worked by hand.


@pytest.mark.parametrize(
    ("counts", "sp", "sizes", "cumulative"),
    [
        ([5, 7], 2, [3, 3, 4, 4], [3, 6, 10, 14]),
        ([0, 5], 2, [0, 0, 3, 3], [0, 0, 3, 6]),
        ([1, 8], 4, [1, 1, 1, 1, 2, 2, 2, 2], [1, 2, 3, 4, 6, 8, 10, 12]),
        ([500, 200, 256], 1, [500, 200, 256], [500, 700, 956]),
        ([0, 0], 2, [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_sizes_and_cumulative_sizes(counts, sp, sizes, cumulative):
    metadata = make(counts)
    with metadata.sp_local_sizes(sp) as inside:
        assert inside == sizes
        assert metadata.local_sizes == sizes
        assert metadata.get_chunk_sizes_across_dp_rank() == sizes
    assert metadata.local_sizes is None
    assert metadata.cu_tokens_across_sp(sp).tolist() == cumulative
    assert metadata.cu_tokens_across_sp(sp).dtype == torch.int64


@pytest.mark.parametrize(
    ("counts", "sp", "limit", "chunks"),
    [
        ([500, 200, 256], 1, 256, [[256, 200, 256], [244, 1, 1], [1, 1, 1]]),
        ([120, 80, 140, 100], 1, 64, [[64, 64, 64, 64], [56, 16, 64, 36], [1, 1, 12, 1]]),
        ([0, 300], 2, 100, [[1, 1, 100, 100], [1, 1, 50, 50], [1, 1, 1, 1]]),
    ],
)
def test_chunks(counts, sp, limit, chunks):
    metadata = make(counts)
    for chunk_idx, expected in enumerate(chunks):
        with metadata.chunked_sizes(sp, limit, chunk_idx):
            assert metadata.get_chunk_sizes_across_dp_rank() == expected


def test_sizes_near_the_limit_of_int32_do_not_overflow():
    counts = [2**31 - 1, 2**31 - 1]
    metadata = make(torch.tensor(counts, dtype=torch.int32).tolist())
    with metadata.sp_local_sizes(8) as sizes:
        assert sizes == [2**28] * 16
    assert metadata.cu_tokens_across_sp(1).tolist() == [2**31 - 1, 2**32 - 2]
    with metadata.chunked_sizes(1, 2**31 - 1, 2**31 - 1) as sizes:
        assert sizes == [1, 1]


def test_the_fields_are_tensors_on_the_cpu():
    metadata = make([500, 200, 256])
    assert metadata.max_tokens_across_dp_cpu.shape == ()
    assert metadata.max_tokens_across_dp_cpu.item() == 500
    assert metadata.num_tokens_across_dp_cpu.tolist() == [500, 200, 256]
    assert metadata.num_tokens_across_dp_cpu.dtype == metadata.max_tokens_across_dp_cpu.dtype == torch.int32
    assert metadata.num_tokens_across_dp_cpu.device.type == "cpu"


# Laws.


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12), st.integers(1, 8))
def test_sizes_are_those_of_the_straightforward_tensor_arithmetic(counts, sp):
    metadata = DPMetadata(torch.tensor(max(counts)), torch.tensor(counts))
    straightforward = ((torch.tensor(counts) + sp - 1) // sp).repeat_interleave(sp)
    with metadata.sp_local_sizes(sp) as sizes:
        assert sizes == straightforward.tolist()
    assert torch.equal(metadata.cu_tokens_across_sp(sp), straightforward.cumsum(0))


@given(st.lists(st.sampled_from(["enter", "leave", "leave other"]), max_size=12), st.data())
def test_once_all_contexts_are_left_no_sizes_are_set(steps, data):
    metadata = make([500, 200, 256])
    contexts = [metadata.sp_local_sizes(1), metadata.sp_local_sizes(2), metadata.chunked_sizes(1, 256, 1)]
    entered = []
    for step in steps:
        context = data.draw(st.sampled_from(contexts))
        if step == "enter":
            assert context.__enter__() == metadata.local_sizes
            entered.append(context)
        elif step == "leave" and entered:
            entered.pop().__exit__(None, None, None)
        else:
            context.__exit__()
            places = [place for place, other in enumerate(entered) if other is context]
            if places:
                del entered[places[-1]]
        # The law: what was entered last and is not left counts.
        assert metadata.local_sizes is (entered[-1].sizes if entered else None)
    for context in contexts * len(entered):
        context.__exit__()
    assert metadata.local_sizes is None


# Contexts.


def test_a_nested_context_gives_the_outer_sizes_back():
    metadata = make([500, 200, 256])
    with metadata.sp_local_sizes(1):
        with metadata.chunked_sizes(1, 256, 1):
            assert metadata.local_sizes == [244, 1, 1]
        assert metadata.local_sizes == [500, 200, 256]
    assert metadata.local_sizes is None


def test_an_exception_passes_and_leaves_no_sizes():
    metadata = make([5, 7])
    with pytest.raises(KeyError, match="boom"), metadata.sp_local_sizes(2):
        raise KeyError("boom")
    assert metadata.local_sizes is None


def test_leaving_with_what_a_foreign_caller_sends_restores():
    metadata = make([5, 7])
    outer, inner = metadata.sp_local_sizes(1), metadata.sp_local_sizes(2)
    outer.__enter__()
    inner.__enter__()
    assert inner.__exit__("Elixir.RuntimeError", "boom", None) is False
    assert metadata.local_sizes == [5, 7]
    outer.__exit__("Elixir.RuntimeError", "boom", None)
    assert metadata.local_sizes is None


def test_leaving_the_inner_twice_does_not_leave_the_outer():
    metadata = make([5, 7])
    outer, inner = metadata.sp_local_sizes(2), metadata.sp_local_sizes(2)
    outer.__enter__()
    inner.__enter__()
    inner.__exit__()
    inner.__exit__()
    assert metadata.local_sizes == [3, 3, 4, 4]
    outer.__exit__()
    assert metadata.local_sizes is None


def test_leaving_without_having_entered_changes_nothing():
    metadata = make([5, 7])
    with metadata.sp_local_sizes(1):
        metadata.sp_local_sizes(1).__exit__()
        assert metadata.local_sizes == [5, 7]
    metadata.sp_local_sizes(1).__exit__()
    assert metadata.local_sizes is None


def test_leaving_in_the_order_of_entering_never_shows_sizes_that_are_left():
    metadata = make([5, 7])
    first, second = metadata.sp_local_sizes(1), metadata.sp_local_sizes(2)
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert metadata.local_sizes == [3, 3, 4, 4]
    second.__exit__()
    assert metadata.local_sizes is None


def test_a_context_may_be_used_again_and_inside_itself():
    metadata = make([5, 7])
    context = metadata.sp_local_sizes(2)
    with context, context:
        assert metadata.local_sizes == [3, 3, 4, 4]
    assert metadata.local_sizes is None
    with context as sizes:
        assert sizes == [3, 3, 4, 4]
    assert repr(context) == "SizesContext([3, 3, 4, 4], not entered)"


def test_outside_a_context_the_getter_says_what_to_do():
    metadata = make([5, 7])
    with pytest.raises(RuntimeError, match="no sizes outside a context: call this within `with metadata"):
        metadata.get_chunk_sizes_across_dp_rank()


def test_two_objects_do_not_share_sizes():
    first, second = make([5, 7]), make([1, 8])
    with first.sp_local_sizes(1), second.sp_local_sizes(1):
        assert first.local_sizes == [5, 7]
        assert second.local_sizes == [1, 8]


def test_sizes_are_computed_once_and_are_plain_integers():
    metadata = make(torch.tensor([5, 7]))
    for context in (metadata.sp_local_sizes, metadata.sp_local_sizes):
        with context(2) as sizes, context(1), context(2) as again:
            assert sizes is again
    with metadata.chunked_sizes(2, 2, 1) as sizes, metadata.chunked_sizes(2, 2, 1) as again:
        assert sizes is again
    assert type(sizes) is list
    assert {type(size) for size in sizes} == {int}


def test_asking_for_chunk_after_chunk_keeps_a_limited_number_of_lists():
    metadata = make([5, 7])
    first = metadata.chunked_sizes(1, 1, 0).sizes
    assert metadata.chunked_sizes(1, 1, 0).sizes is first
    for chunk_idx in range(5000):
        assert metadata.chunked_sizes(1, 1, chunk_idx).sizes == [1, 1]
    assert metadata.chunked_sizes(1, 1, 0).sizes is not first  # it was let go


def test_a_context_that_is_dropped_is_left():
    metadata = make([5, 7])
    metadata.sp_local_sizes(1).__enter__()
    assert metadata.local_sizes is None
    context = metadata.sp_local_sizes(1)
    context.__enter__()
    context.__enter__()
    assert metadata.local_sizes == [5, 7]
    del context
    assert metadata.local_sizes is None
    with pytest.raises(RuntimeError, match="no sizes outside a context"):
        metadata.get_chunk_sizes_across_dp_rank()


@pytest.mark.parametrize("dropped", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (2, 1, 0), (0, 1, 2)])
def test_of_nested_contexts_any_may_be_dropped(dropped):
    metadata = make([500, 200, 256])
    contexts = {0: metadata.sp_local_sizes(1), 1: metadata.sp_local_sizes(2), 2: metadata.chunked_sizes(1, 256, 1)}
    for context in contexts.values():
        context.__enter__()
    del context
    for place in dropped:
        del contexts[place]
        assert metadata.local_sizes is (contexts[max(contexts)].sizes if contexts else None)
    for context in contexts.values():
        context.__exit__()
    assert metadata.local_sizes is None


def test_a_context_in_a_reference_cycle_is_left_by_the_garbage_collector():
    class Holder:
        pass

    metadata, holder = make([5, 7]), Holder()
    holder.itself, holder.context = holder, metadata.sp_local_sizes(1)
    holder.context.__enter__()
    del holder
    gc.collect()
    assert metadata.local_sizes is None


@pytest.mark.parametrize("sp", [1, 2])
def test_a_context_that_is_kept_after_its_block_is_nobody_elses(sp):
    metadata = make([5, 7])
    kept = metadata.sp_local_sizes(sp)
    with kept:
        pass
    other = metadata.sp_local_sizes(sp)
    assert other is not kept
    other.__enter__()
    del other
    assert metadata.local_sizes is None
    kept.__enter__()
    with metadata.sp_local_sizes(sp), metadata.sp_local_sizes(3 - sp):
        assert metadata.local_sizes != kept.sizes
    assert metadata.local_sizes is kept.sizes
    del kept
    assert metadata.local_sizes is None


def test_a_context_outlives_its_metadata():
    context = make([5, 7]).sp_local_sizes(2)
    for _ in range(3):
        with context as sizes:
            assert sizes == [3, 3, 4, 4]
        gc.collect()
    context.__exit__()


def test_threads_get_contexts_of_their_own():
    metadata, everyone, handed_out = make([5, 7]), threading.Barrier(8), []

    def take():
        for _ in range(200):
            context = metadata.sp_local_sizes(1)
            everyone.wait(10)
            handed_out.append(id(context))
            everyone.wait(10)
            context.__enter__()
            context.__exit__()
            del context
            everyone.wait(10)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(handed_out) == 8 * 200
    for turn in range(0, len(handed_out), 8):
        assert len(set(handed_out[turn : turn + 8])) == 8
    assert metadata.local_sizes is None


def test_a_block_keeps_its_context():
    metadata = make([5, 7])
    with metadata.sp_local_sizes(1):
        gc.collect()
        assert metadata.local_sizes == [5, 7]


def test_a_generator_that_is_dropped_inside_its_block_leaves():
    metadata = make([5, 7])

    def layers():
        with metadata.sp_local_sizes(1):
            yield metadata.local_sizes

    walk = layers()
    assert next(walk) == [5, 7]
    del walk
    assert metadata.local_sizes is None


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_context_without_attributes_is_dropped_in_silence():
    SizesContext()


def test_a_step_that_is_over_is_freed_without_the_garbage_collector():
    metadata = make([5, 7])
    with metadata.sp_local_sizes(2), metadata.chunked_sizes(1, 2, 0):
        pass
    gone = weakref.ref(metadata)
    gc.disable()
    try:
        del metadata
        assert gone() is None
    finally:
        gc.enable()


# What comes in.


class Labelled(torch.Tensor):
    """A subclass that changes nothing of what a tensor does."""


class Small(enum.IntEnum):
    FIVE = 5
    SEVEN = 7


def in_silence(build):
    """Make a tensor of a kind that torch warns of."""
    with warnings.catch_warnings(action="ignore"):
        return build()


class Unreadable(Sequence):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise OSError("the disk is gone")

    def __repr__(self):
        raise OSError("the disk is gone")


@pytest.mark.parametrize(
    "counts",
    [
        [5, 7],
        (5, 7),
        range(5, 8, 2),
        np.array([5, 7]),
        np.array([5, 7], dtype=np.uint32),
        [np.int64(5), torch.tensor(7)],
        torch.tensor([5, 7]),
        torch.tensor([5, 7], dtype=torch.uint8),
        torch.tensor([5, 0, 7, 0])[::2],
        torch.tensor([5, 7], dtype=torch.uint16),
        torch.tensor([5, 7], dtype=torch.uint32),
        torch.tensor([5, 7], dtype=torch.uint64),
        torch.nn.Parameter(torch.tensor([5, 7]), requires_grad=False),
        torch.tensor([5, 7]).as_subclass(Labelled),
        np.array([5, 7], dtype=object),
        np.ma.array([5, 7]),
        array.array("i", [5, 7]),
        memoryview(np.array([5, 7])),
        collections.deque([5, 7]),
        [Small.FIVE, Small.SEVEN],
    ],
)
def test_sequences_arrays_and_tensors_of_counts(counts):
    config = ParallelConfig(data_parallel_size=2, data_parallel_rank=1)
    metadata = DPMetadata.make(config, 7, counts)
    assert metadata == DPMetadata(7, [5, 7]) == DPMetadata(torch.tensor(7), counts)
    with metadata.sp_local_sizes(2) as sizes:
        assert sizes == [3, 3, 4, 4]
        assert {type(size) for size in sizes} == {int}


def test_any_object_with_size_and_rank_is_a_config():
    config = SimpleNamespace(data_parallel_size=2, data_parallel_rank=np.int64(1))
    assert DPMetadata.make(config, torch.tensor(7), [5, 7]) == DPMetadata(7, [5, 7])


def test_later_writes_to_the_tensor_that_came_in_change_nothing():
    counts = torch.tensor([5, 7])
    metadata = DPMetadata.make(ParallelConfig(2, 0), 5, counts)
    counts[0] = 100
    assert metadata.num_tokens_across_dp_cpu.tolist() == [5, 7]
    with metadata.sp_local_sizes(1) as sizes:
        assert sizes == [5, 7]
    assert metadata == make([5, 7])


def write_in_place(metadata):
    metadata.num_tokens_across_dp_cpu[0] = 6


def write_through_a_view(metadata):
    metadata.num_tokens_across_dp_cpu[:1].fill_(6)


def write_behind_the_version(metadata):
    metadata.num_tokens_across_dp_cpu.data[0] = 6


def write_through_numpy(metadata):
    metadata.num_tokens_across_dp_cpu.numpy()[0] = 6


def write_to_the_maximum(metadata):
    metadata.max_tokens_across_dp_cpu.add_(1)


def write_as_an_output(metadata):
    torch.add(torch.tensor([1, 2], dtype=torch.int32), 4, out=metadata.num_tokens_across_dp_cpu)


def write_in_inference_mode(metadata):
    with torch.inference_mode():
        metadata.num_tokens_across_dp_cpu.zero_()


def set_another(metadata):
    metadata.num_tokens_across_dp_cpu = torch.tensor([5, 6])


def set_none(metadata):
    metadata.num_tokens_across_dp_cpu = None


WRITES = [
    write_in_place, write_through_a_view, write_behind_the_version, write_through_numpy, write_to_the_maximum,
    write_as_an_output, write_in_inference_mode, set_another, set_none,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.sp_local_sizes(1),
        lambda m: m.sp_local_sizes(2),
        lambda m: m.chunked_sizes(1, 4, 0),
        lambda m: m.cu_tokens_across_sp(1),
        lambda m: m == make([5, 7]),
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
    ],
)
def test_a_field_that_was_written_to_is_refused_by_whatever_comes_next(write, use):
    metadata = make([5, 7])
    with metadata.sp_local_sizes(1):
        pass
    write(metadata)
    with pytest.raises(TokenCountError, match="num_tokens_across_dp_cpu was changed after the metadata was made, from"):
        use(metadata)
    # What it was made from can still be seen.
    assert "num_tokens_across_dp_cpu=[5, 7]" in repr(metadata)


@pytest.mark.parametrize("largest", [torch.tensor(8), 7.5])
def test_another_maximum_is_refused_too(largest):
    metadata = make([5, 7])
    metadata.max_tokens_across_dp_cpu = largest
    with pytest.raises(TokenCountError, match=r"max_tokens_across_dp_cpu was changed .* from 7 to"):
        metadata.sp_local_sizes(1)


@pytest.mark.parametrize("num_ranks", [3, 40, 300])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint32])
def test_counts_are_shown_and_guarded_in_every_number_and_dtype(num_ranks, dtype):
    counts = [(7 * rank) % 101 for rank in range(num_ranks)]
    metadata = DPMetadata.make(ParallelConfig(num_ranks, 1), 7, torch.tensor(counts, dtype=dtype))
    assert metadata == make(counts, rank=1)
    assert metadata.num_tokens_across_dp_cpu.tolist() == counts
    assert metadata.max_tokens_across_dp_cpu.item() == max(counts)
    with metadata.sp_local_sizes(1) as sizes:
        assert sizes == counts
    metadata.num_tokens_across_dp_cpu.numpy()[-1] += 1
    with pytest.raises(TokenCountError, match=r"num_tokens_across_dp_cpu was changed"):
        metadata.sp_local_sizes(1)


def test_metadata_made_in_inference_mode_works_outside_and_inside():
    with torch.inference_mode():
        metadata = make(torch.tensor([5, 7]))
        with metadata.sp_local_sizes(2) as sizes:
            assert sizes == [3, 3, 4, 4]
    with metadata.sp_local_sizes(2) as sizes:
        assert sizes == [3, 3, 4, 4]
    assert copy.deepcopy(metadata) == metadata


def test_arrays_and_lists_are_copied_too():
    array, counts = np.array([5, 7], dtype=np.int32), [5, 7]
    from_array, from_list = DPMetadata(7, array), DPMetadata(7, counts)
    array[0] = counts[0] = 100
    assert from_array == from_list == make([5, 7])
    assert from_array.num_tokens_across_dp_cpu.tolist() == [5, 7]


# What is refused.


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([500, -3], r"got -3 on DP rank 1"),
        (torch.tensor([500, -3]), r"got -3 on DP rank 1"),
        (torch.tensor([500, 2**31]), r"got 2147483648 on DP rank 1"),
        (torch.cat([torch.zeros(200, dtype=torch.int64), torch.tensor([-3])]), r"got -3 on DP rank 200"),
        (torch.tensor([5.0, 7.0]), r"must have an integer dtype, got torch.float32"),
        (torch.tensor([True, False]), r"must have an integer dtype, got torch.bool"),
        (torch.tensor([[5, 7]]), r"must have 1 dimension, got shape \(1, 2\)"),
        (torch.tensor(5), r"must have 1 dimension, got shape \(\)"),
        (torch.empty(2, dtype=torch.int32, device="meta"), r"must be on the CPU, .* got meta"),
        (torch.tensor([], dtype=torch.int32), r"must have one entry per DP rank, got none"),
        ([5, True], r"must be integers, got True on DP rank 1"),
        ([5, 7.0], r"must be integers, got 7.0 on DP rank 1"),
        (None, r"must be a sequence of integers, one per DP rank, got None"),
        # Tensors of other kinds.
        (torch.tensor([5, 7]).to_sparse(), r"must be a dense tensor, got torch.sparse_coo"),
        (torch.tensor([5 + 0j, 7 + 0j]), r"must have an integer dtype, got torch.complex64"),
        (in_silence(lambda: torch.tensor([[5, 7]]).to_sparse_csr()), r"must be a dense tensor, got torch.sparse_csr"),
        (in_silence(lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)), r"got torch.qint8"),
        (torch.tensor([5.0, 7.0]).to(torch.float8_e4m3fn), r"got torch.float8_e4m3fn"),
        (
            in_silence(lambda: torch.nested.nested_tensor([torch.ones(1).int()])),
            r"must be a dense tensor, got a nested",
        ),
        (FakeTensorMode().from_tensor(torch.tensor([5, 7])), r"must be a plain tensor, got a FakeTensor"),
        (torch.tensor([5, 2**63 - 1]), r"got 9223372036854775807 on DP rank 1"),
        (torch.tensor([5, 2**64 - 1], dtype=torch.uint64), r"got 18446744073709551615 on DP rank 1"),
        # Arrays of other kinds.
        (np.array([5, "seven"], dtype=object), r"must be integers, got 'seven' on DP rank 1"),
        (np.array([5, None], dtype=object), r"must be integers, got None on DP rank 1"),
        (np.array([[5, 7]]), r"must be integers, got \[5, 7\] on DP rank 0"),
        (np.array(5), r"must be a sequence of integers, one per DP rank, got array\(5\)"),
        (np.ma.array([5, 7], mask=[0, 1]), r"must be integers, got None on DP rank 1"),
        (np.array([5, 7], dtype="m8[s]"), r"must have an integer dtype, got timedelta64\[s\]"),
        (np.array([5, 7], dtype="M8[ns]"), r"must have an integer dtype, got datetime64\[ns\]"),
        (np.array([5.0, math.nan]), r"must be integers, got 5.0 on DP rank 0"),
        (np.array([True, False]), r"must be integers, got True on DP rank 0"),
        # Sequences and what only looks like them.
        ([5, [7]], r"must be integers, got \[7\] on DP rank 1"),
        ([[5, 7]], r"must be integers, got \[5, 7\] on DP rank 0"),
        ([5, math.nan], r"must be integers, got nan on DP rank 1"),
        ([5, "7"], r"must be integers, got '7' on DP rank 1"),
        ([5, 10**5000], r"must be in 0..2147483647, got an integer of 16610 bits on DP rank 1"),
        ([5, -(10**5000)], r"must be in 0..2147483647, got an integer of 16610 bits on DP rank 1"),
        ([5, torch.tensor([7, 8])], r"must be integers, got tensor\(\[7, 8\]\) on DP rank 1"),
        (
            [5, torch.empty((), dtype=torch.int64, device="meta")],
            r"must be integers, got tensor\(.*meta.* on DP rank 1",
        ),
        ([5, np.True_], r"must be integers, got (np\.)?True_? on DP rank 1"),
        ([5, fractions.Fraction(7)], r"must be integers, got Fraction\(7, 1\) on DP rank 1"),
        ("57", r"must be a sequence of integers, one per DP rank, got '57'"),
        (b"57", r"must be a sequence of integers, one per DP rank, got b'57'"),
        ({5: 7}, r"must be a sequence of integers, one per DP rank, got {5: 7}"),
        ((count for count in [5, 7]), r"must be a sequence of integers, one per DP rank, got <generator"),
        (range(0), r"must have one entry per DP rank, got none"),
        (Unreadable(), r"cannot be read from this Unreadable: 'the disk is gone'"),
        (["x" * 10000], r"must be integers, got 'xx.{0,200}\.\.\. on DP rank 0$"),
    ],
)
def test_wrong_counts_are_refused_at_once(counts, message):
    with pytest.raises(TokenCountError, match=message):
        DPMetadata.make(ParallelConfig(2, 0), 5, counts)
    with pytest.raises(TokenCountError, match=message):
        DPMetadata(7, counts)


@pytest.mark.parametrize(
    ("config", "num_tokens", "error", "message"),
    [
        (ParallelConfig(3, 0), 5, TokenCountError, r"must have one entry per DP rank, 3, got 2 \(on DP rank 0\)"),
        (ParallelConfig(2, 1), 5, TokenCountError, r"has 7 on DP rank 1, whose num_tokens is 5"),
        (ParallelConfig(2, 1), True, TokenCountError, r"num_tokens of DP rank 1 must be an integer, got True"),
        (ParallelConfig(2, 1), 7.0, TokenCountError, r"num_tokens of DP rank 1 must be an integer, got 7.0"),
        (ParallelConfig(2, 1), -7, TokenCountError, r"num_tokens of DP rank 1 must be >= 0, got -7"),
        (None, 5, ConfigurationError, r"must have data_parallel_size and data_parallel_rank, got None"),
        (
            SimpleNamespace(data_parallel_size=2, data_parallel_rank=2),
            5,
            ConfigurationError,
            r"data_parallel_rank must be below data_parallel_size 2, got 2",
        ),
        (SimpleNamespace(data_parallel_size=0, data_parallel_rank=0), 5, ConfigurationError, r"must be >= 1, got 0"),
    ],
)
def test_counts_that_do_not_fit_this_rank_are_refused(config, num_tokens, error, message):
    with pytest.raises(error, match=message):
        DPMetadata.make(config, num_tokens, [5, 7])


def test_true_is_no_count_even_where_it_equals_one():
    with pytest.raises(TokenCountError, match="got True"):
        DPMetadata.make(ParallelConfig(2, 0), True, [1, 2])
    with pytest.raises(TokenCountError, match="got True"):
        DPMetadata(True, [1, 1])


def test_counts_inside_a_fake_or_transformed_world_are_refused():
    config = ParallelConfig(2, 0)
    with FakeTensorMode(), pytest.raises(TokenCountError, match="must be a plain tensor, got a FakeTensor"):
        DPMetadata.make(config, 5, torch.tensor([5, 7]))
    counts = torch.tensor([[5, 7]])
    with pytest.raises(TokenCountError, match="cannot be read from this Tensor"):
        torch.vmap(lambda row: row + DPMetadata.make(config, 5, row).cu_tokens_across_sp(1))(counts)


@pytest.mark.parametrize(
    ("largest", "message"),
    [
        pytest.param(10**5000, r"the largest count, 7 on DP rank 1, got an integer of 16610 bits", id="huge"),
        (torch.tensor(7).to_sparse(), r"max_tokens_across_dp_cpu must be a dense tensor, got torch.sparse_coo"),
        (torch.empty((), dtype=torch.int64, device="meta"), r"max_tokens_across_dp_cpu must be on the CPU"),
        (FakeTensorMode().from_tensor(torch.tensor(7)), r"must be a plain tensor, got a FakeTensor"),
        (math.nan, r"max_tokens_across_dp_cpu must be an integer, got nan"),
        ("7", r"max_tokens_across_dp_cpu must be an integer, got '7'"),
        (8, r"max_tokens_across_dp_cpu must be the largest count, 7 on DP rank 1, got 8"),
        (torch.tensor(5), r"max_tokens_across_dp_cpu must be the largest count, 7 on DP rank 1, got 5"),
        (torch.tensor([7]), r"max_tokens_across_dp_cpu must have 0 dimensions, got shape \(1,\)"),
        (torch.tensor(7.0), r"max_tokens_across_dp_cpu must have an integer dtype, got torch.float32"),
        (None, r"max_tokens_across_dp_cpu must be an integer, got None"),
    ],
)
def test_a_wrong_maximum_is_refused(largest, message):
    with pytest.raises(TokenCountError, match=message):
        DPMetadata(largest, [5, 7])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sp_local_sizes(0), "sequence_parallel_size must be >= 1, got 0"),
        (lambda m: m.sp_local_sizes(-2), "sequence_parallel_size must be >= 1, got -2"),
        (lambda m: m.sp_local_sizes(True), "sequence_parallel_size must be an integer, got True"),
        (lambda m: m.sp_local_sizes(1.0), "sequence_parallel_size must be an integer, got 1.0"),
        (lambda m: m.sp_local_sizes(None), "sequence_parallel_size must be an integer, got None"),
        (lambda m: m.sp_local_sizes([1]), r"sequence_parallel_size must be an integer, got \[1\]"),
        (
            lambda m: m.sp_local_sizes(10**5000),
            "sequence_parallel_size must be <= 2147483647, got an integer of 16610 b",
        ),
        (lambda m: m.sp_local_sizes(-(10**5000)), "sequence_parallel_size must be >= 1, got an integer of 16610 bits"),
        (lambda m: m.sp_local_sizes("2"), "sequence_parallel_size must be an integer, got '2'"),
        (lambda m: m.chunked_sizes(1, 10**5000, 0), "max_chunk_size_per_rank must be <= 2147483647, got an integer"),
        (lambda m: m.sp_local_sizes(2**30), "2 DP ranks must be <= 1048576 ranks, got 2147483648"),
        (lambda m: m.cu_tokens_across_sp(0), "sp_size must be >= 1, got 0"),
        (lambda m: m.cu_tokens_across_sp(True), "sp_size must be an integer, got True"),
        (lambda m: m.chunked_sizes(0, 4, 0), "sequence_parallel_size must be >= 1, got 0"),
        (lambda m: m.chunked_sizes(1, 0, 0), "max_chunk_size_per_rank must be >= 1, got 0"),
        (lambda m: m.chunked_sizes(1, 4, -1), "chunk_idx must be >= 0, got -1"),
        (lambda m: m.chunked_sizes(1, 4, None), "chunk_idx must be an integer, got None"),
    ],
)
def test_wrong_arguments_raise_at_the_call_and_name_the_rank(call, message):
    for metadata in (make([5, 7], rank=1), make([5, 7], rank=1)):
        # Also after the sizes for 1, which equals True and 1.0, have been made.
        with pytest.raises(ConfigurationError, match=rf"{message}.*\(on DP rank 1 of 2\)$"):
            call(metadata)
        metadata.sp_local_sizes(1), metadata.cu_tokens_across_sp(1), metadata.chunked_sizes(1, 4, 0)
        with pytest.raises(ConfigurationError, match=message):
            call(metadata)
        assert metadata.local_sizes is None


def test_without_a_config_no_rank_is_named():
    with pytest.raises(ConfigurationError, match=r"^sequence_parallel_size must be >= 1, got 0$"):
        DPMetadata(7, [5, 7]).sp_local_sizes(0)


def test_a_size_tensor_that_is_written_to_is_read_again():
    metadata, sp = make([5, 7]), torch.tensor(1)
    with metadata.sp_local_sizes(sp) as sizes:
        assert sizes == [5, 7]
    sp.fill_(2)
    with metadata.sp_local_sizes(sp) as sizes:
        assert sizes == [3, 3, 4, 4]


# As a value.


def test_equality_compares_values():
    assert make([5, 7]) == make([5, 7], rank=1)
    assert make([5, 7]) == make(torch.tensor([5, 7], dtype=torch.int64))
    assert make([5, 7]) != make([5, 8])
    assert make([5, 7]) != [5, 7]
    metadata = make([5, 7])
    with metadata.sp_local_sizes(1):
        assert metadata != make([5, 7])
    assert metadata == make([5, 7])


def test_instances_are_unhashable():
    with pytest.raises(TypeError, match="unhashable"):
        hash(make([5, 7]))


def test_repr_is_one_readable_line():
    metadata = make([5, 7])
    assert repr(metadata) == (
        "DPMetadata(max_tokens_across_dp_cpu=7, num_tokens_across_dp_cpu=[5, 7], local_sizes=None)"
    )
    with metadata.sp_local_sizes(2):
        assert repr(metadata).endswith("local_sizes=[3, 3, 4, 4])")
    assert len(repr(make([1000] * 1024))) < 250


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_starts_outside_every_context(duplicate):
    metadata = make([5, 7])
    with metadata.sp_local_sizes(1):
        twin = duplicate(metadata)
        assert twin.local_sizes is None
        with twin.sp_local_sizes(2):
            assert metadata.local_sizes == [5, 7]
        assert metadata.local_sizes == [5, 7]
    assert twin == metadata


def test_sizes_given_to_the_constructor_last_until_a_context():
    metadata = DPMetadata(max_tokens_across_dp_cpu=7, num_tokens_across_dp_cpu=[5, 7], local_sizes=[3, 4])
    assert metadata.get_chunk_sizes_across_dp_rank() == [3, 4]
    with metadata.sp_local_sizes(1):
        pass
    assert metadata.local_sizes is None
    with pytest.raises(TokenCountError, match=r"local_sizes must be in .* got -1"):
        DPMetadata(7, [5, 7], [-1])


def test_it_is_a_dataclass_with_three_fields():
    assert [field.name for field in dataclasses.fields(DPMetadata)] == [
        "max_tokens_across_dp_cpu",
        "num_tokens_across_dp_cpu",
        "local_sizes",
    ]


# Subclasses, as `dataclass` and plain Python make them.


@dataclasses.dataclass
class Layered(DPMetadata):
    layer: int = 0
    notes: list = dataclasses.field(default_factory=list, compare=False, repr=False)


@dataclasses.dataclass
class PostInit(DPMetadata):
    limit: dataclasses.InitVar[int] = 4
    chunks: int = dataclasses.field(init=False, default=0)

    def __post_init__(self, limit):
        # Without a call of super(): the counts are there all the same.
        self.chunks = -(-int(self.max_tokens_across_dp_cpu) // limit)


@dataclasses.dataclass(slots=True)
class Slotted(DPMetadata):
    layer: int = 0


class Plain(DPMetadata):
    def __init__(self, counts):
        super().__init__(max(counts), counts)
        self.layer = 3


SUBCLASSES = [
    lambda: Layered(7, [5, 7], layer=3),
    lambda: PostInit(7, [5, 7], 2),
    lambda: Slotted(torch.tensor(7), torch.tensor([5, 7]), layer=3),
    lambda: Plain([5, 7]),
]


@pytest.mark.parametrize("build", SUBCLASSES)
@pytest.mark.parametrize(
    "duplicate",
    [lambda m: m, copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
)
def test_subclasses_work_and_are_copied_with_all_that_they_have(build, duplicate):
    original = build()
    with original.sp_local_sizes(1):
        metadata = duplicate(original)
        assert (metadata.local_sizes is None) or metadata is original
    assert type(metadata) is type(original)
    assert metadata == original
    for name in ("layer", "chunks"):
        assert getattr(metadata, name, None) == getattr(original, name, None)
    with metadata.sp_local_sizes(2) as sizes:
        assert sizes == [3, 3, 4, 4]
    assert metadata.local_sizes is None
    assert metadata.num_tokens_across_dp_cpu.tolist() == [5, 7]


def test_subclasses_are_checked_as_their_parent():
    for wrong in (lambda: Layered(7, [5, -7]), lambda: PostInit(8, [5, 7]), lambda: Slotted(7, torch.tensor([5.0]))):
        with pytest.raises(TokenCountError, match=r"num_tokens_across_dp_cpu must|must be the largest count, 7"):
            wrong()


def test_subclasses_compare_and_show_their_own_fields():
    metadata = Layered(7, [5, 7], layer=3, notes=["a"])
    assert metadata == Layered(7, torch.tensor([5, 7]), layer=3)
    assert metadata != Layered(7, [5, 7], layer=4)
    assert metadata != DPMetadata(7, [5, 7])
    assert DPMetadata(7, [5, 7]) != metadata
    assert repr(metadata) == (
        "Layered(max_tokens_across_dp_cpu=7, num_tokens_across_dp_cpu=[5, 7], local_sizes=None, layer=3)"
    )
    with pytest.raises(TypeError, match="unhashable"):
        hash(metadata)


def test_replace_makes_a_copy_outside_every_context():
    metadata = Layered(7, [5, 7], layer=3)
    with metadata.sp_local_sizes(1):
        other = dataclasses.replace(metadata, layer=4)
        assert other.local_sizes is None
        assert other == Layered(7, [5, 7], layer=4)
        assert dataclasses.replace(make([5, 7])) == make([5, 7])
    changed = dataclasses.replace(metadata, max_tokens_across_dp_cpu=9, num_tokens_across_dp_cpu=[9, 1])
    with changed.sp_local_sizes(1) as sizes:
        assert sizes == [9, 1]
    with pytest.raises(TokenCountError, match="must be the largest count, 9 on DP rank 0, got 7"):
        dataclasses.replace(metadata, num_tokens_across_dp_cpu=[9, 1])
    with pytest.raises(ValueError, match="local_sizes"):
        dataclasses.replace(metadata, local_sizes=[5, 7])


def test_copies_share_nothing_that_can_be_written_to():
    metadata = make([5, 7])
    for duplicate in (copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        twin = duplicate(metadata)
        twin.num_tokens_across_dp_cpu[0] = 6
        with metadata.sp_local_sizes(1) as sizes:
            assert sizes == [5, 7]


def test_a_copy_still_names_the_rank():
    with pytest.raises(ConfigurationError, match=r"got 0 \(on DP rank 1 of 2\)"):
        copy.deepcopy(make([5, 7], rank=1)).sp_local_sizes(0)


def test_fields_become_dictionaries_and_tuples():
    metadata = make([5, 7])
    assert list(dataclasses.asdict(metadata)) == [field.name for field in dataclasses.fields(metadata)]
    assert dataclasses.astuple(metadata)[1].tolist() == [5, 7]
