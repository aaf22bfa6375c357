"""Fused decoder layers under Triton's interpreter, against the whole model's own forward pass."""

import multiprocessing
import os

import numpy
import pytest
import torch

pytest.importorskip("transformers")

from lockstep.engine.kv_cache import KVCache
from lockstep.models.tiny import make_tiny

pytestmark = [
    pytest.mark.skipif(
        numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0", reason="Triton 3.6's interpreter needs numpy < 2.4"
    ),
]


def _rows(cache, ids, start, stop, generates):
    """Rows `start..stop` of one request in row 2 of the block table."""
    from lockstep.engine.decoder import Prompts, Rows

    positions = torch.arange(start, stop)
    row_seqs = torch.full((stop - start,), 2, dtype=torch.int32)
    slots = (cache.block_table[2, positions // 64] * 64 + positions % 64).to(torch.int32)
    lengths = (positions + 1).to(torch.int32)

    def i32(*values):
        return torch.tensor(values, dtype=torch.int32)

    prompts = None if generates else Prompts(i32(2), i32(0, stop - start), i32(stop))
    return Rows(ids[start:stop], positions, row_seqs, lengths, slots, stop - start if generates else 0, prompts)


def _compare(path, sender):
    os.environ["TRITON_INTERPRET"] = "1"
    from lockstep.engine.decoder import TransformersDecoder, probe_shapes
    from lockstep.engine.fused import FusedDecoder
    from lockstep.models.loading import load_pretrained

    ids = torch.randint(0, 256, (80,), generator=torch.Generator().manual_seed(0))
    expected, results = None, {}
    for name in ("Transformers'", "fused"):
        model = load_pretrained(path, dtype=torch.float32, device="cpu")
        shapes, dtype = probe_shapes(model)
        with torch.no_grad():
            expected = model(input_ids=ids[None]).logits[0] if expected is None else expected
        cache = KVCache(shapes, 8, 4, 256, dtype, torch.device("cpu"))
        decoder = FusedDecoder.of(model, cache) if name == "fused" else TransformersDecoder(model, cache)
        cache.grow(2, len(ids))
        cache.flush()
        parts = [(0, 50, False), (50, 70, False), *((i, i + 1, True) for i in range(70, 80))]
        with torch.no_grad():
            found = torch.cat([decoder(_rows(cache, ids, *part)) for part in parts])
        results[name] = decoder.name, float((found - expected).abs().max())
    sender.send(results)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_fused_layers_compute_what_the_model_does(tmp_path, architecture):
    pytest.importorskip("triton")
    path = make_tiny(tmp_path, architecture=architecture, num_layers=2)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_compare, args=(path, sender))
    process.start()
    assert receiver.poll(240)
    for name, (used, error) in receiver.recv().items():
        assert used == name and error < 1e-4
    process.join()
