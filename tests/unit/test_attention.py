"""Attention over pages: PyTorch's kernels on the CPU, and the Triton kernels under Triton's interpreter."""

import importlib.util
import multiprocessing
import os
import traceback

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_cases import (
    LENGTHS,
    PROMPTS,
    SHAPES,
    Cache,
    Shape,
    check_decode,
    check_prompts,
    device_tensor,
)
from lockstep.engine.attention import (
    AttentionOptions,
    attend_decode,
    attend_prompts,
    attention_name,
    decode_workspace,
    write_keys,
)
from lockstep.errors import ConfigurationError

needs_interpreter = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0", reason="Triton 3.6's interpreter needs numpy < 2.4"
    ),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_rows_equal_the_reference(shape):
    for seed, lengths in enumerate(LENGTHS):
        check_decode(shape, lengths, seed=seed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prompts_equal_the_reference(shape):
    for seed, prompts in enumerate(PROMPTS):
        check_prompts(shape, prompts, seed=seed)


shapes = st.builds(
    Shape,
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 7, 8]),
    head_dim=st.sampled_from([8, 24, 64]),
    value_dim=st.sampled_from([8, 40]),
    window=st.none() | st.integers(1, 200),
    softcap=st.none() | st.just(5.0),
    sinks=st.booleans(),
)


@settings(max_examples=30)
@given(shapes, st.lists(st.integers(0, 200), min_size=1, max_size=9), st.integers(0, 9))
def test_any_decode_rows(shape, lengths, seed):
    check_decode(shape, lengths, seed=seed)


@settings(max_examples=30)
@given(shapes, st.lists(st.tuples(st.integers(0, 150), st.integers(1, 70)), min_size=1, max_size=4), st.integers(0, 9))
def test_any_prompts(shape, prompts, seed):
    check_prompts(shape, prompts, seed=seed)


def test_half_precision_on_the_cpu():
    check_decode(SHAPES[1], LENGTHS[3], torch.bfloat16)
    check_prompts(SHAPES[1], PROMPTS[3], torch.bfloat16)


def test_nothing_to_do():
    cache = Cache(SHAPES[0], [3], torch.float32, "cpu")
    none, query = device_tensor([], "cpu"), torch.empty(0, 4, 64)
    before = cache.key_pages.clone()
    write_keys(query[:, :2], query[:, :2], cache.key_pages, cache.value_pages, none)
    assert torch.equal(cache.key_pages, before) or torch.equal(cache.key_pages.isnan(), before.isnan())
    pages = cache.key_pages, cache.value_pages, cache.block_table
    assert attend_decode(query, *pages, none, none, cache.options()).shape == (0, 4, 64)
    assert attend_prompts(query, *pages, none, device_tensor([0], "cpu"), none, cache.options()).shape == (0, 4, 64)


def test_the_name_says_why():
    assert attention_name("cpu") == ("scaled_dot_product_attention (the Triton kernels need a CUDA GPU)")
    assert decode_workspace(4, 8, 2, 64, "cpu") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"key_pages": torch.zeros(3, 32, 2, 64)},
            r"key_pages must be \[num_pages, 64, 2, dim\], got \[3, 32, 2, 64\]",
        ),
        ({"value_pages": torch.zeros(3, 64, 1, 64)}, r"value_pages must be \[num_pages, 64, 2, dim\]"),
        ({"value_pages": torch.zeros(3, 2, 64, 64).transpose(1, 2)}, "value_pages must be contiguous, got strides"),
        ({"query": torch.zeros(1, 3, 64)}, "3 query heads of 64 do not fit 2 key heads of 64"),
        ({"lengths": torch.ones(1, dtype=torch.int64)}, r"lengths must be contiguous int32, got torch\.int64"),
        ({"options": AttentionOptions(1.0, sliding_window=0)}, "sliding_window must be >= 1 or None, got 0"),
        ({"options": AttentionOptions(1.0, sinks=torch.zeros(3))}, r"one score per head, 4, got \[3\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "query": torch.zeros(1, 4, 64),
        "key_pages": torch.zeros(3, 64, 2, 64),
        "value_pages": torch.zeros(3, 64, 2, 64),
        "block_table": device_tensor([[0]], "cpu"),
        "row_seqs": device_tensor([0], "cpu"),
        "lengths": device_tensor([1], "cpu"),
        "options": AttentionOptions(1.0),
    }
    with pytest.raises(ConfigurationError, match=message):
        attend_decode(**(arguments | change))


# Under Triton's interpreter, which runs one program after another: the last one merges


def _interpreted(name, errors):
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    try:
        globals()[name]()
        errors.put(None)
    except BaseException:
        errors.put(traceback.format_exc())


def _decode_cases():
    for seed, shape in enumerate(SHAPES):
        check_decode(shape, [0, 1, 63, 64, 65, 200, 0], seed=seed)
    check_decode(SHAPES[0], [1000])


def _prompt_cases():
    for seed, shape in enumerate(SHAPES):
        check_prompts(shape, [(0, 66), (90, 5), (63, 1), (1, 0)], seed=seed)
    check_prompts(SHAPES[0], [(935, 65)])


def _cut_cases():
    """Grids and tiles that cut rows everywhere, with a workspace that goes from call to call."""
    from lockstep.engine import attention_launch
    from lockstep.engine.attention import DecodeWorkspace

    shape = Shape(sinks=True)
    for programs in (1, 2, 5, 20):
        for tile in (32, 64):
            tiles = attention_launch.DecodeTiles(tile=tile, programs_per_sm=programs, max_pieces=1000)
            workspace = decode_workspace(8, 4, 2, 64, "cpu", programs=2 * programs)
            assert isinstance(workspace, DecodeWorkspace)
            workspace.partials.fill_(float("nan"))
            workspace.stats.fill_(float("nan"))
            out = torch.full((5, 4, 64), float("nan"))
            buffers = out, workspace, False, tiles
            for seed in range(2):
                check_decode(
                    shape, [0, 1, 150, 64, 65], seed=seed,
                    attend=lambda *step, b=buffers: attention_launch.attend_decode(*step, *b) or b[0],
                )  # fmt: skip
                assert not workspace.arrivals.any()
    small = decode_workspace(1, 4, 2, 64, "cpu")
    with pytest.raises(ConfigurationError, match="the workspace is for 1 rows, got 2"):
        check_decode(Shape(), [1, 1], attend=lambda *arguments: attend_decode(*arguments, workspace=small))


class TestInterpreted:
    pytestmark = needs_interpreter

    @pytest.mark.parametrize("name", ["_decode_cases", "_prompt_cases", "_cut_cases"])
    def test_triton_kernels_equal_the_reference(self, name):
        context = multiprocessing.get_context("spawn")
        errors = context.Queue()
        process = context.Process(target=_interpreted, args=(name, errors))
        process.start()
        error = errors.get(timeout=250)
        process.join()
        assert error is None, error
