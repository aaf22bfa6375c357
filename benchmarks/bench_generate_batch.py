"""Transformers' `generate_batch` over uneven ranks, with CUDA graphs and without, beside our engine.

Qwen3-30B-A3B's shape with random weights, bfloat16: 64 requests on one rank, 8 on the other, greedy.

    python benchmarks/bench_generate_batch.py --commit abc1234 --out generate_batch.jsonl

Checks before timing: each token against the whole model on one GPU, where that model's two best logits lie further
apart than rounding explains. Each case runs once for the check, which also captures, and is timed from then on.
A record: `tokens_per_s` is of all ranks, prompts included, by the wall clock of the slowest rank, the median of rounds.
"""

import argparse
import faulthandler
import itertools
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench_model import Run, make_config, make_model, prompts_of

LEAD = 0.06  # of the largest logit; a larger one does not change sides by rounding, unless a router wavers


@torch.no_grad()
def wrong_tokens(whole, prompts, tokens):
    """Return how many tokens the whole model would not have drawn: where its choice leads, and in all."""
    leading = other = 0
    for prompt, drawn in zip(prompts, tokens, strict=True):
        ids = torch.tensor([prompt + drawn[:-1]], device=whole.device)
        best = whole(input_ids=ids, logits_to_keep=len(drawn)).logits[0].float().topk(2)
        differs = best.indices[:, 0] != torch.tensor(drawn, device=whole.device)
        lead = (best.values[:, 0] - best.values[:, 1]) / best.values[:, 0].abs()
        leading, other = leading + int((differs & (lead > LEAD)).sum()), other + int(differs.sum())
    return leading, other


def batching(arguments, graphs):
    """Return Transformers' settings, with a cache that holds all requests of a rank."""
    from transformers import ContinuousBatchingConfig

    page = 32
    blocks = max(arguments.sizes) * (-(-(arguments.prompt + arguments.tokens) // page) + 1)
    return ContinuousBatchingConfig(
        page_size=page, num_blocks=blocks, max_batch_tokens=1024, use_cuda_graph=graphs, auto_switch_to_flash=False,
        allow_block_sharing=False,
    )  # fmt: skip


def by_transformers(arguments, model, prompts, graphs):
    """Return a function that generates this rank's tokens by `generate_batch`; its manager is kept."""
    from transformers import GenerationConfig

    settings = GenerationConfig(max_new_tokens=arguments.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    config = batching(arguments, graphs)

    def generate():
        answers = model.generate_batch(
            prompts, generation_config=settings, continuous_batching_config=config, persistent_manager=True
        )
        return [answer.generated_tokens for answer in answers.values()]

    return generate


def by_engine(arguments, model, prompts):
    """Return a function that generates this rank's tokens by `RankEngine`."""
    from lockstep.engine.rank_engine import RankEngine
    from lockstep.engine.sampling import SamplingParams
    from lockstep.workload import SchedulerConfig

    config = SchedulerConfig(
        max_num_batched_tokens=1024, max_num_seqs=64, kv_capacity_tokens=64 * 1024, enable_prefix_caching=False
    )
    engine = RankEngine(model, config, max_model_len=1024, graphs=torch.cuda.is_available())
    params = SamplingParams(max_tokens=arguments.tokens, temperature=0.0, ignore_eos=True)
    numbers = itertools.count()

    def generate():
        got = {next(numbers): [] for _ in prompts}
        for number, prompt in zip(got, prompts, strict=True):
            engine.add(number, prompt, params)
        outputs = list(engine.step())
        while engine.any_unfinished:
            outputs += engine.step()
        for output in [*outputs, *engine.drain()]:
            got[output.request_id].append(output.token_id)
        engine.reports.clear()
        return list(got.values())

    return generate


def worker(rank, arguments, store, started):
    """Check and time the cases on one rank."""
    faulthandler.dump_traceback_later(arguments.limit_s + 20 - (time.time() - started), exit=True)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # says that its manager is kept, as asked
    cuda = torch.cuda.is_available()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2
    )
    import lockstep
    from lockstep.models import generate_graphs
    from lockstep.models.parallel import parallel_of

    run = Run(arguments, rank, started)
    configs = [make_config(arguments.layers, arguments.tiny) for _ in range(2)]  # `parallelize` writes into one
    whole, model = (make_model(config, run.device) for config in configs)
    model.set_attn_implementation(arguments.attention)
    if not cuda:
        whole, model = whole.float(), model.float()
    case = arguments.sizes, (arguments.prompt, arguments.prompt)
    prompts = prompts_of(run, case, configs[0].vocab_size).tolist()
    model = lockstep.parallelize(model, dispatcher="nvlink" if cuda else "allgather", deadline_s=60)
    run.say(f"models of {arguments.layers} layers")
    replays = 0
    replay = generate_graphs._CapturedForward.replay

    def counted(*details):
        nonlocal replays
        replays += 1
        return replay(*details)

    generate_graphs._CapturedForward.replay = counted

    def measure(name, generate):
        run.barrier()
        began = time.perf_counter()
        tokens = generate()
        (first_s,) = run.largest(time.perf_counter() - began)
        leading, other = wrong_tokens(whole, prompts, tokens)
        expected = [arguments.tokens] * len(prompts)
        (incomplete,) = run.largest([len(one) for one in tokens] != expected)
        if incomplete:
            raise RuntimeError(f"{name}: requests without all of their tokens")
        before, rounds = replays, []
        for _ in range(arguments.rounds):
            run.sync()
            run.barrier()
            began = time.perf_counter()
            generate()
            rounds += run.largest(time.perf_counter() - began)
        leading, other, replayed = run.largest(leading, other, (replays - before) / arguments.rounds)
        run.write({
            "benchmark": "generate_batch", "backend": name, "attention": arguments.attention,
            "layers": arguments.layers, "batches": list(arguments.sizes), "prompt": arguments.prompt,
            "tokens": arguments.tokens, "tokens_per_s": round(sum(arguments.sizes) * arguments.tokens
                                                             / statistics.median(rounds)),
            "seconds": [round(seconds, 3) for seconds in rounds], "first_seconds": round(first_s, 2),
            "batches_replayed": replayed, "tokens_wrong": int(leading), "tokens_other_within_rounding": int(other),
        })  # fmt: skip

    for name, graphs in (("generate_batch, no graphs", False), ("generate_batch, graphs", True)):
        if run.has_time(20):
            with lockstep.join(model):
                measure(name, by_transformers(arguments, model, prompts, graphs))
                model.destroy_cached_continuous_batching_manager()
    if run.has_time(15):
        parallel_of(model).open()
        measure("lockstep engine", by_engine(arguments, model, prompts))
    run.barrier()
    run.say("done")
    os._exit(0)


def main():
    """Read the options and start two ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs=2, default=(64, 8), help="requests of each rank")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attention", default="sdpa", help="or flash_attention_2, if it is installed")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script on a CPU")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit-s", type=float, default=90, help="no case begins that would end later; all in all")
    arguments = parser.parse_args()
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (arguments, f"{folder}/store", time.time()), nprocs=2)


if __name__ == "__main__":
    main()
