"""The mapped memory of a full host: how much each rank maps, that no index leaves its section, and int32 offsets.

The indices are those that the kernels compute in int32 (`kernels_dispatch.py`, `kernels_combine.py`), at their largest.
"""

import importlib
import importlib.util
import itertools
import sys
from types import SimpleNamespace

import pytest

MIB = 2**20
MULTIPROCESSORS = 132  # of an H100 or H200
TOP_K = 8
SHAPES = {(7168, 256): "7168", (2048, 128): "2048"}  # hidden size and experts, as in benchmarks/bench_dispatch.py
ORDER = [
    "ids", "weights", "counts", "dispatch_flags", "combine_flags", "abort", "rows_as_words", "returned_as_words",
    "scales", "rows", "returned", "nbytes",
]  # fmt: skip


@pytest.fixture(scope="module")
def mapped_layout():
    """The module; where Triton is missing, with a stand-in for the one function that it takes from there."""
    name = "lockstep.dispatch.mapped_layout"
    if importlib.util.find_spec("triton") is not None:
        yield importlib.import_module(name)
        return
    triton = SimpleNamespace(next_power_of_2=lambda n: 1 << (n - 1).bit_length())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton", triton)
        module = importlib.import_module(name)
    del sys.modules[name]  # what needs Triton itself shall still say that it is missing
    yield module


def _layout(mapped_layout, ranks, hidden, experts, capacity, fp8):
    """Return launch sizes and layout as `NvlinkDispatcher` makes them, with row stride and scale groups."""
    stride, groups = -(-hidden // 16) * 16, -(-hidden // mapped_layout.FP8_GROUP)
    launch = mapped_layout.launch_sizes(MULTIPROCESSORS, ranks, experts // ranks, hidden, capacity)
    layout = mapped_layout.make_layout(ranks, capacity, TOP_K, stride, groups, fp8, launch)
    return launch, layout, stride, groups


def _largest_indices(launch, layout, ranks, capacity, hidden, stride, groups, fp8):
    """Return `{section: (bytes of an element, its largest index)}`, the last rank's last token, pair, block."""
    slot = (ranks - 1) * capacity + capacity - 1
    copies = launch.order_blocks + launch.push_blocks
    row_end = stride // (4 if fp8 else 2)
    last_row_word = row_end + groups - 1 if fp8 else row_end - 1
    word_row = (ranks - 1) * layout.row_word_tokens + layout.row_word_tokens - 1
    returned_row = (ranks - 1) * launch.word_tokens + launch.word_tokens - 1
    return {
        "ids": (8, slot * TOP_K + TOP_K - 1),
        "weights": (8, slot * TOP_K + TOP_K - 1),
        "counts": (8, (ranks - 1) * copies + copies - 1),
        "dispatch_flags": (8, (ranks - 1) * launch.push_blocks + launch.push_blocks - 1),
        "combine_flags": (8, (ranks - 1) * launch.combine_blocks + launch.combine_blocks - 1),
        "abort": (8, 0),
        "rows_as_words": (8, word_row * layout.words_per_row + last_row_word),
        "returned_as_words": (8, returned_row * (stride // 2) + stride // 2 - 1),
        "scales": (4, slot * groups + groups - 1 if fp8 else -1),
        "rows": (1 if fp8 else 2, slot * stride + hidden - 1),
        "returned": (2, slot * stride + hidden - 1),
    }


def _check_indices(launch, layout, indices):
    for section, following in itertools.pairwise(ORDER):
        width, largest = indices[section]
        start = getattr(layout, section)
        assert start % 256 == 0, section
        assert start + (largest + 1) * width <= getattr(layout, following), section
        assert largest < 2**31, section
    assert launch.order_blocks + launch.push_blocks <= 2 * MULTIPROCESSORS  # all resident at once
    assert launch.combine_blocks <= 2 * MULTIPROCESSORS


@pytest.mark.parametrize(
    ("hidden", "experts", "fp8", "expected_mib"),
    [(7168, 256, False, 904.0), (7168, 256, True, 687.0), (2048, 128, False, 264.0), (2048, 128, True, 202.1)],
)
def test_what_a_rank_of_eight_maps_for_4096_rows(mapped_layout, hidden, experts, fp8, expected_mib):
    """Nearly all are rows, out and back: 448 MiB each way for 7168 values of two bytes."""
    _, layout, *_ = _layout(mapped_layout, 8, hidden, experts, 4096, fp8)
    assert layout.nbytes / MIB == pytest.approx(expected_mib, abs=0.1)
    rows = 8 * 4096 * hidden * (1 + 2 if fp8 else 2 + 2)
    scales = 8 * 4096 * (hidden // 128) * 4 if fp8 else 0
    routing = 2 * 8 * 4096 * TOP_K * 8
    assert 0 < layout.nbytes - rows - scales - routing < 4.5 * MIB  # rows as words, counts, flags


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("hidden", "experts"), SHAPES, ids=SHAPES.values())
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_no_index_leaves_its_section_or_int32(mapped_layout, ranks, hidden, experts, fp8):
    largest_capacity = (2**31 - 1) // (ranks * hidden)  # what the dispatcher accepts
    for capacity in (1, 9, 64, 4096, 8192, largest_capacity):
        launch, layout, stride, groups = _layout(mapped_layout, ranks, hidden, experts, capacity, fp8)
        indices = _largest_indices(launch, layout, ranks, capacity, hidden, stride, groups, fp8)
        _check_indices(launch, layout, indices)


def test_one_row_more_than_int32_offsets_reach_is_refused():
    pytest.importorskip("triton")
    from lockstep.dispatch.nvlink import NvlinkDispatcher
    from lockstep.errors import ConfigurationError

    group = SimpleNamespace(rank=lambda: 0, size=lambda: 8)
    with pytest.raises(ConfigurationError, match=r"8 ranks x 37450 tokens x 7168 values exceed 2\*\*31 elements"):
        NvlinkDispatcher(group, num_experts=256, hidden_size=7168, top_k=8, max_tokens_per_rank=37450)
