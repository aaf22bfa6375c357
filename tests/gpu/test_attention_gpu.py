"""Attention over pages on a real GPU: every dtype, and one CUDA graph for steps of other lengths."""

import pytest
import torch

from attention_cases import (
    LENGTHS,
    PROMPTS,
    SHAPES,
    Cache,
    Shape,
    assert_near,
    attend_plainly,
    check_decode,
    check_prompts,
    device_tensor,
)
from lockstep.engine.attention import attend_decode, attention_name, decode_workspace, write_keys

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(NUM_GPUS < 1, reason=f"needs a GPU, found {NUM_GPUS}"),
    pytest.mark.timeout(300),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LONG = [3000, 1, 8192, 0, 64, 65, 511, 512, 513]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_rows_equal_the_reference(shape, dtype):
    for seed, lengths in enumerate([*LENGTHS, LONG]):
        check_decode(shape, lengths, dtype, "cuda", seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prompts_equal_the_reference(shape, dtype):
    for seed, prompts in enumerate(PROMPTS):
        check_prompts(shape, prompts, dtype, "cuda", seed)


def test_long_rows_that_continue_a_prompt():
    """Tiles in the middle of a request, without masks."""
    print(attention_name("cuda"))
    check_prompts(SHAPES[1], [(700, 300), (3, 200)], torch.bfloat16, "cuda")


def test_one_graph_serves_other_lengths_and_other_rows():
    shape = Shape(kv_heads=4, group=8, head_dim=128, value_dim=128)
    lengths = [5000, 1, 64, 0, 700, 2, 3, 1500]
    cache = Cache(shape, lengths, torch.bfloat16, "cuda")
    options, pages = cache.options(), (cache.key_pages, cache.value_pages, cache.block_table)
    query = cache.randn(8, 32, 128)
    row_seqs, sees = device_tensor(cache.order, "cuda"), device_tensor(lengths, "cuda")
    workspace = decode_workspace(8, 32, 4, 128, "cuda")
    out = torch.empty_like(query)
    attend_decode(query, *pages, row_seqs, sees, options, out=out, workspace=workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend_decode(query, *pages, row_seqs, sees, options, out=out, workspace=workspace)
    for seen in (lengths, [1] * 8, [4097, 0, 0, 0, 0, 0, 0, 0], [17, 1, 3, 0, 699, 0, 2, 65]):
        sees.copy_(device_tensor([min(a, b) for a, b in zip(seen, lengths, strict=True)], "cuda"))
        out.fill_(float("nan"))
        graph.replay()
        expected = torch.cat(
            [
                attend_plainly(query[i : i + 1], cache.keys[i][:n], cache.values[i][:n], options)
                for i, n in enumerate(sees.tolist())
            ]
        )
        assert_near(out, expected, torch.bfloat16)
        assert not workspace.arrivals.any()
        again = attend_decode(query, *pages, row_seqs, sees, options, workspace=workspace)
        assert torch.equal(out, again)  # bit by bit, whichever piece arrives last


def test_pieces_arrive_in_any_order_with_the_same_bits():
    shape = Shape(kv_heads=4, group=8, head_dim=128, value_dim=128)
    cache = Cache(shape, [8192, 100, 4000], torch.bfloat16, "cuda")
    options = cache.options()
    pages = cache.key_pages, cache.value_pages, cache.block_table
    numbers = device_tensor(cache.order, "cuda"), device_tensor([8192, 100, 4000], "cuda")
    query = cache.randn(3, 32, 128)
    workspace = decode_workspace(3, 32, 4, 128, "cuda")
    first = attend_decode(query, *pages, *numbers, options, workspace=workspace)
    for _ in range(300):
        assert torch.equal(attend_decode(query, *pages, *numbers, options, workspace=workspace), first)


def test_writing_then_reading_in_one_graph():
    """Launches that overlap (programmatic dependent launch) still see the keys of this step."""
    shape = Shape(kv_heads=4, group=8, head_dim=128, value_dim=128)
    cache = Cache(shape, [129, 64], torch.bfloat16, "cuda")
    options = cache.options()
    pages = cache.key_pages, cache.value_pages, cache.block_table
    row_seqs, lengths = device_tensor(cache.order, "cuda"), device_tensor([129, 64], "cuda")
    slots = torch.stack([cache.block_table[cache.order[0], 2] * 64, cache.block_table[cache.order[1], 0] * 64 + 63])
    query, key, value = cache.randn(2, 32, 128), cache.randn(2, 4, 128), cache.randn(2, 4, 128)

    def step():
        write_keys(key, value, cache.key_pages, cache.value_pages, slots)
        return attend_decode(query, *pages, row_seqs, lengths, options, tables_ready=True)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(20):
        for tensor in (query, key, value):
            tensor.copy_(cache.randn(*tensor.shape))
        graph.replay()
        expected = [
            attend_plainly(
                query[i : i + 1], torch.cat([k[:-1], key[i : i + 1]]), torch.cat([v[:-1], value[i : i + 1]]), options
            )
            for i, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True))
        ]
        assert_near(out, torch.cat(expected), torch.bfloat16)


def test_many_requests_of_all_sizes():
    generator = torch.Generator().manual_seed(0)
    lengths = (2 ** (torch.rand(256, generator=generator) * 11)).int().tolist()
    check_decode(SHAPES[1], lengths, torch.bfloat16, "cuda")
    rows = [min(length, 40) for length in lengths[:64]]
    check_prompts(SHAPES[1], [(n - r, r) for n, r in zip(lengths[:64], rows, strict=True)], torch.bfloat16, "cuda")
