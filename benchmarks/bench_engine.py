"""The engine over the GPUs at hand, step to step: decode and prompts with uneven ranks, beside the floor.

Qwen3-30B-A3B's shape with random weights, bfloat16, through `RankEngine.step` as `lockstep run` and `lockstep.Engine`
use it: agreement, forward pass, head and sampling included, by the wall clock of the slowest rank.

    python benchmarks/bench_engine.py --gpus 4 --layers 32 --commit abc1234 --out engine.jsonl

Checks before timing, in bfloat16: the first token of every prompt against the whole model on one GPU, where that
model's two best logits lie further apart than rounding explains; and replayed steps against eager ones, token by token.
Each record: `decode_ms_per_layer` is the median over steps in which all requests of the case generate;
`prompts_ms` is from the first step with prompts to the first token of the last one; `floor_ms_per_layer` is what
reading the weights, keys and values of such a step would take at the measured speed of a copy.
"""

import argparse
import faulthandler
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
from uneven import batches


def references_of(run, model, cases):
    """First token of each of this rank's prompts by the whole model, and by how far it leads, per case."""
    found = []
    with torch.no_grad():
        for case in cases:
            ids = prompts_of(run, case, model.config.vocab_size)
            if not len(ids):
                found.append(None)
                continue
            rows = torch.cat([model(input_ids=part, logits_to_keep=1).logits[:, -1].float() for part in ids.split(16)])
            top = rows.topk(2).values
            found.append((rows.argmax(-1).tolist(), ((top[:, 0] - top[:, 1]) / rows.abs().amax(-1)).tolist()))
    return found


def run_case(run, engine, case, tokens, numbers):
    """Run a case once.

    Returns:
        Seconds from step to step while all requests generate, seconds of the prompts, and tokens by request.
    """
    from lockstep.engine.sampling import SamplingParams

    sizes, _ = case
    prompts = prompts_of(run, case, engine.limits.vocab_size).tolist()
    first = next(numbers)
    ids = [first] + [next(numbers) for _ in prompts[1:]]
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    run.sync()
    run.barrier()
    for number, prompt in zip(ids, prompts, strict=False):
        engine.add(number, prompt, params)
    got = {number: [] for number in ids[: len(prompts)]}
    total, marks, reports = sum(sizes), [time.perf_counter()], []
    engine.reports.clear()
    engine.step()
    while engine.any_unfinished:
        for output in engine.step():
            got[output.request_id].append(output.token_id)
        marks.append(time.perf_counter())
    for output in engine.drain():
        got[output.request_id].append(output.token_id)
    reports = list(engine.reports)
    # `marks[i]` ends the wait for the tokens of step i - 1.
    full = [
        i for i, report in enumerate(reports)
        if sum(report.num_tokens_across_dp) == total and i and sum(reports[i - 1].num_tokens_across_dp) == total
    ]  # fmt: skip
    steps = [marks[i + 1] - marks[i] for i in full[2:-2] if i + 1 < len(marks)]
    last_prompt = max(i for i, report in enumerate(reports) if report.schedule.num_prefill_tokens or i == 0)
    run.last_prompt = int(run.largest(last_prompt)[0])
    prompts_s = marks[min(run.last_prompt + 1, len(marks) - 1)] - marks[0]
    return steps, prompts_s, [got[number] for number in ids[: len(prompts)]], reports


def floor_us(config, case, ranks, copy_gbps):
    """Microseconds per layer of reading what one decode step reads on the busiest rank."""
    sizes, lengths = case
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    rows = sum(sizes)
    used = (1 - (1 - config.num_experts_per_tok / config.num_experts) ** rows) * config.num_experts / ranks
    experts = used * 3 * hidden * inner
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    attention = hidden * dim * (2 * heads + 2 * kv_heads) + hidden * config.num_experts
    head = config.vocab_size * hidden / config.num_hidden_layers
    keys = max(n * m for n, m in zip(sizes, lengths, strict=True)) * 2 * kv_heads * dim
    return 2 * (experts + attention + head + keys) / copy_gbps / 1e3


def copy_speed(device):
    """GB/s that a large copy reads (and writes as much)."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    target.copy_(source)
    begin.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 2 * 10 * 2**30 / begin.elapsed_time(end) / 1e6


def profile(run, engine, case, numbers, path):
    """Write down the kernels of one decode step, by name."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        run_case(run, engine, case, 12, numbers)
    if run.rank == 0:
        events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        by_name = {}
        for event in events:
            count, total = by_name.get(event.name, (0, 0.0))
            by_name[event.name] = count + 1, total + event.device_time
        with open(path, "w") as file:
            file.write(f"case {case}, 12 tokens\n")
            for name, (count, total) in sorted(by_name.items(), key=lambda item: -item[1][1])[:60]:
                file.write(f"{total:12.0f} us {count:7d} x {total / count:8.2f}  {name[:110]}\n")


def worker(rank, arguments, store, started):
    faulthandler.dump_traceback_later(arguments.limit_s + 20 - (time.time() - started), exit=True)
    logging.getLogger("lockstep").addHandler(logging.StreamHandler())
    logging.getLogger("lockstep").setLevel(logging.INFO)
    cuda = torch.cuda.is_available()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(arguments.gpus))
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.FileStore(store, arguments.gpus), rank=rank, world_size=arguments.gpus,
    )  # fmt: skip
    import itertools

    import lockstep
    from lockstep.engine.rank_engine import RankEngine
    from lockstep.models.parallel import parallel_of
    from lockstep.workload import SchedulerConfig

    run = Run(arguments, rank, started)
    cases = batches(arguments.gpus)
    if arguments.cases:
        cases = [cases[index] for index in arguments.cases]
    if arguments.tiny:
        cases = [(tuple(min(n, 3) for n in sizes), tuple(min(m, 8) for m in lengths)) for sizes, lengths in cases]
    speed = copy_speed(run.device) if cuda else 10.0
    config = make_config(arguments.layers, arguments.tiny)
    model = make_model(config, run.device)
    if not cuda:
        model = model.float()
    references = references_of(run, model, cases)
    run.say(f"whole model of {arguments.layers} layers, and its references; a copy moves {speed:.0f} GB/s")
    model = lockstep.parallelize(model, dispatcher="nvlink" if cuda else "allgather", deadline_s=60)
    parallel = parallel_of(model)
    parallel.open()
    if cuda:
        torch.cuda.empty_cache()
    settings = SchedulerConfig(max_num_batched_tokens=4096 if cuda else 64, max_num_seqs=256 if cuda else 8,
                               kv_capacity_tokens=arguments.kv_tokens, enable_prefix_caching=False)  # fmt: skip
    begun = time.time()
    engine = RankEngine(model, settings, max_model_len=4352, graphs=cuda)
    run.say(f"engine ready in {time.time() - begun:.1f} s, {engine.cache.num_pages} pages, "
            f"{engine.about()}")  # fmt: skip
    numbers = itertools.count()
    for case, reference in zip(cases, references, strict=True):
        if not run.has_time(15):
            run.say(f"no time for {case}")
            break
        *_, tokens, _ = run_case(run, engine, case, 6, numbers)
        wrong = total = differ = 0
        if reference is not None:
            for mine, best, lead in zip(tokens, *reference, strict=True):
                total += 1
                differ += mine[0] != best
                wrong += mine[0] != best and lead > 0.05
        graphs, engine._device_step.graphs = engine._device_step.graphs, None
        *_, eager, _ = run_case(run, engine, case, 6, numbers)
        engine._device_step.graphs = graphs
        unequal = sum(a != b for a, b in zip(tokens, eager, strict=True))
        rounds = [run_case(run, engine, case, arguments.tokens, numbers) for _ in range(arguments.rounds)]
        steps = [step for steps, *_ in rounds for step in steps]
        replayed = sum(report.replayed for report in rounds[-1][3])
        decode, prompts = run.largest(
            statistics.median(steps) if steps else 0.0, statistics.median(prompts for _, prompts, *_ in rounds)
        )
        wrong, differ, unequal = run.largest(wrong, differ, unequal)
        run.write({
            "benchmark": "engine", "backend": "lockstep engine", "layers": arguments.layers, "batches": list(case[0]),
            "prompt": case[1][0] if len(set(case[1])) == 1 else list(case[1]), "decode_ms": round(1e3 * decode, 3),
            "decode_ms_per_layer": round(1e3 * decode / arguments.layers, 4), "prompts_ms": round(1e3 * prompts, 1),
            "floor_ms_per_layer": round(floor_us(config, case, arguments.gpus, speed) / 1e3, 4),
            "steps_counted": len(steps), "steps_replayed": replayed, "first_tokens_wrong": int(wrong),
            "first_tokens_other_within_rounding": int(differ), "requests_unequal_to_eager": int(unequal),
            "tokens_per_s": round(sum(case[0]) / max(decode, 1e-9)),
        })  # fmt: skip
    if arguments.profile and cuda:
        for index in arguments.profile_cases:
            profile(run, engine, cases[index], numbers, f"{arguments.profile}_{index}.txt")
    run.barrier()
    run.say("done")
    os._exit(0)


def read_options(arguments=None):
    """Return the options of a command line, the process's own by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, choices=(2, 4, 8), help="ranks, with a GPU each")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=40, help="of each request in a timed round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", type=int, nargs="*", help="only these of the cases, by index")
    parser.add_argument("--kv-tokens", type=int, help="tokens of KV cache; what memory allows otherwise")
    parser.add_argument("--profile", help="write the kernels of one run of some cases to PREFIX_<case>.txt")
    parser.add_argument("--profile-cases", type=int, nargs="*", default=[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script on a CPU")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit-s", type=float, default=255, help="no case begins that would end later; all in all")
    return parser.parse_args(arguments)


def main():
    arguments = read_options()
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (arguments, f"{folder}/store", time.time()), nprocs=arguments.gpus)


if __name__ == "__main__":
    main()
