"""A whole model over the GPUs at hand: decode and prefill with uneven batches, against Transformers and our backends.

Qwen3-30B-A3B's shape with random weights. Every rank first runs its own batch on the whole model, alone, and the logits
of the parallel model are held against that. Then, in one run: our `allgather` (NCCL), our `nvlink`, eager and with
decode steps as CUDA graphs, and Transformers' own expert parallelism (`all_to_all`, FSDP on the dense weights as it
demands; fewer layers, since it needs a checkpoint on disk). bfloat16, the slowest rank counts, medians.

    torchrun --nproc-per-node 2 benchmarks/bench_model.py --out results.jsonl
"""

import argparse
import faulthandler
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import StaticCache

import lockstep
from lockstep.models.huggingface import parallel_of

CASES = {
    2: [((1, 1), 64), ((64, 8), 64), ((64, 64), 64), ((256, 256), 64), ((16, 1), 1024), ((64, 0), 64)],
    4: [((1, 1, 1, 1), 64), ((64, 8, 1, 0), 64), ((64, 64, 64, 64), 64), ((256, 64, 8, 1), 64), ((16, 1, 1, 0), 1024)],
}


def make_config(layers, tiny):
    from transformers import Qwen3MoeConfig

    sizes = {
        "hidden_size": 64 if tiny else 2048,
        "num_attention_heads": 4 if tiny else 32,
        "num_key_value_heads": 2 if tiny else 4,
        "head_dim": 16 if tiny else 128,
        "num_experts": 8 if tiny else 128,
        "num_experts_per_tok": 2 if tiny else 8,
        "moe_intermediate_size": 64 if tiny else 768,
        "vocab_size": 512 if tiny else 151936,
    }
    return Qwen3MoeConfig(
        num_hidden_layers=layers,
        intermediate_size=6144,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        **sizes,
    )


def make_model(config, device):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def batch_of(rank, size, length, vocabulary, device):
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, vocabulary, (size, length), generator=generator).to(device)


WARM_STEPS = 3  # not counted: the second decode step of a kind is captured, from the third on it is replayed


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def run_case(model, ids, steps, device, static=False):
    """Prefill, then decode greedily; seconds of each, and the logits after the prompt."""
    sync(device)
    dist.barrier()
    started = time.perf_counter()
    if ids.shape[0] == 0:
        return 0.0, 0.0, None
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + steps + WARM_STEPS) if static else None
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = output.logits[:, -1]
    sync(device)
    prefill_s = time.perf_counter() - started
    for index in range(steps + WARM_STEPS):
        if index == WARM_STEPS:
            sync(device)
            started = time.perf_counter()
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    sync(device)
    return prefill_s, (time.perf_counter() - started) / steps, logits.float()


def common_fields(arguments, device):
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {
        "ranks": dist.get_world_size(),
        "hardware": hardware,
        "torch": torch.__version__,
        "commit": arguments.commit,
    }


def slowest(seconds, device):
    value = torch.tensor([seconds], device=device, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def measure(name, model, layers, cases, arguments, device, references, session):
    rank, records = dist.get_rank(), []
    for (sizes, length), reference in zip(cases, references, strict=True):
        if not session and 0 in sizes:
            continue  # Transformers' experts wait for ever where a rank has nothing to run
        ids = batch_of(rank, sizes[rank], length, model.config.vocab_size, device)
        times = []
        error = 0.0
        for index in range(arguments.rounds + 1):
            if session:
                with lockstep.join(model):
                    static = name.endswith("graph")
                    prefill_s, decode_s, logits = run_case(model, ids, arguments.steps, device, static)
            else:
                prefill_s, decode_s, logits = run_case(model, ids, arguments.steps, device)
            if logits is not None and reference is not None:
                error = float((logits - reference).norm() / reference.norm())
            pair = slowest(prefill_s, device), slowest(decode_s, device)
            if index:
                times.append(pair)
        prefill_ms, decode_ms = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        record = {
            "benchmark": "model", "backend": name, "layers": layers, "batches": list(sizes), "prompt": length,
            "prefill_ms": round(prefill_ms, 2), "decode_ms": round(decode_ms, 3),
            "decode_ms_per_layer": round(decode_ms / layers, 4), "tokens_per_s": round(sum(sizes) / decode_ms * 1e3, 1),
            "relative_error": round(slowest(error, device), 5),
        }  # fmt: skip
        records.append(record)
        if rank == 0:
            record |= common_fields(arguments, device)
            print(record, flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    return records


def references_of(model, cases, device):
    """The logits of this rank's batches on the whole model, alone."""
    rank, found = dist.get_rank(), []
    with torch.no_grad():
        for sizes, length in cases:
            ids = batch_of(rank, sizes[rank], length, model.config.vocab_size, device)
            found.append(model(input_ids=ids, logits_to_keep=1).logits[:, -1].float() if len(ids) else None)
    return found


def lockstep_backends(model, layers, cases, arguments, device, references):
    records = []
    for name in arguments.dispatchers:
        parallel = parallel_of(model)
        parallel.dispatcher_name = name.removesuffix(" graph")
        parallel.max_chunk_size_per_rank = arguments.max_chunk_size
        parallel.close()
        records += measure(f"lockstep {name}", model, layers, cases, arguments, device, references, True)
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--baseline-layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-chunk-size", type=int, default=16384)
    parser.add_argument("--dispatchers", nargs="*", default=["allgather", "nvlink", "nvlink graph"])
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script on a CPU")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--limit-s", type=float, default=900, help="show where each rank stands, and end, after so long"
    )
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(arguments.limit_s, exit=True)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    cases = CASES[ranks]
    if arguments.tiny:
        cases = [(tuple(min(size, 3) for size in sizes), min(length, 8)) for sizes, length in cases[:3]] + [((2, 0), 4)]
    records = []
    if not arguments.no_baseline:
        folder = tempfile.gettempdir() + "/lockstep-bench-model"
        layers = arguments.baseline_layers
        model = make_model(make_config(layers, arguments.tiny), device)
        references = references_of(model, cases, device)
        if rank == 0:
            model.save_pretrained(folder)
        dist.barrier()
        model = lockstep.parallelize(model, deadline_s=60)
        records += lockstep_backends(model, layers, cases, arguments, device, references)
        del model
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig

        distributed = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="all_to_all")
        model = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=distributed, dtype=torch.bfloat16
        ).eval()
        records += measure("transformers all_to_all", model, layers, cases, arguments, device, references, False)
        del model
    if cuda:
        torch.cuda.empty_cache()
    model = make_model(make_config(arguments.layers, arguments.tiny), device)
    references = references_of(model, cases, device)
    model = lockstep.parallelize(model, deadline_s=60)
    if cuda:
        torch.cuda.empty_cache()
    records += lockstep_backends(model, arguments.layers, cases, arguments, device, references)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
