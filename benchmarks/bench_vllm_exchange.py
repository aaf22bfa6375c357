"""vLLM with its own all-gather backend, then with Lockstep's exchange: the same cases in one go, on one machine.

    python benchmarks/bench_vllm_exchange.py --gpus 4 --out results.jsonl
    python benchmarks/bench_vllm_exchange.py --gpus 4 --fault stop --out faults.jsonl

Qwen3-30B-A3B's shape with random weights in bfloat16, one process per rank, CUDA graphs and torch.compile on. vLLM must
be importable; Lockstep comes from this checkout, its plugin from an entry point that is made in a temporary folder.
First, tokens are compared: equal up to a place where the baseline's two best tokens are closer than `--tolerance`.

Fields, slowest rank, medians over decode steps in which every request of the case is decoded:

* `decode_ms`: one engine step, wall clock of the worker: scheduling, agreement, model, sampling.
* `decode_forward_ms`: the model's forward alone, CUDA events. `_per_layer` divides by the layers.
* `prefill_step_ms`: the step that holds all prompts, to the start of the first decode step's forward.

One JSON line per case and backend; the lines of the second backend hold each time's `ratio` to the first. The last line
on stdout is one JSON document with all of them. With `--fault`, rank 1's worker is killed or stopped during a long
generation; a line says how long the others took to end, and what their logs say.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing as mp
import os
import queue
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from uneven import batches

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = {"vllm": "", "lockstep": "exchange"}
VOCABULARY = 151936
TIMES = ("decode_ms", "decode_forward_ms", "prefill_step_ms")
COMPARED = 24
"""Tokens of each request that are compared."""
ENVIRONMENT = {
    # Without NVLink multicast, which not every machine grants; neither backend needs it.
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_USE_NCCL_SYMM_MEM": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_HOST_IP": "127.0.0.1", "VLLM_LOOPBACK_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_ENGINE_READY_TIMEOUT_S": "500",
    "PYTHONUNBUFFERED": "1",
}  # fmt: skip


def make_plugins(folder):
    """Write what makes vLLM find Lockstep's plugin and the gate without an installation; return the folder."""
    plugins = Path(folder) / "plugins"
    for name, target in (
        ("lockstep_moe", "lockstep = lockstep.integrations.vllm:register"),
        ("bench_gate", "bench_gate = vllm_probe:gate"),
    ):
        info = plugins / f"{name}-0.0.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.0\n")
        (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{target}\n")
    return plugins


def make_model(folder, layers):
    path = Path(folder) / "model"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": VOCABULARY,
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
        "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_sliding_window": False, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
    }))  # fmt: skip
    return str(path)


def engine_arguments(options, model):
    sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    return {
        "model": model, "skip_tokenizer_init": True, "load_format": "dummy", "dtype": "bfloat16", "seed": 0,
        "tensor_parallel_size": 1, "enable_expert_parallel": True, "all2all_backend": "allgather_reducescatter",
        "max_model_len": 4352, "max_num_seqs": 256, "max_num_batched_tokens": options.batched_tokens,
        "gpu_memory_utilization": 0.8, "enable_prefix_caching": False, "generation_config": "vllm",
        "disable_custom_all_reduce": True, "disable_log_stats": True, "enforce_eager": options.eager,
        "worker_extension_cls": "vllm_probe.Probe",
        "compilation_config": {} if options.eager else {"cudagraph_capture_sizes": sizes},
    }  # fmt: skip


def prompts_of(rank, count, length):
    generator = random.Random(1000 * rank + length)
    return [{"prompt_token_ids": [generator.randrange(VOCABULARY) for _ in range(length)]} for _ in range(count)]


def rank_main(rank, backend, options, folder, port, barrier, results):
    log = open(Path(folder) / f"{backend}_{rank}.log", "ab", buffering=0)  # noqa: SIM115  # until the process ends
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    gate_file = Path(folder) / f"gate{rank}"
    os.environ.update(ENVIRONMENT)
    os.environ.update(
        VLLM_DP_RANK=str(rank), VLLM_DP_RANK_LOCAL=str(rank), VLLM_DP_SIZE=str(options.gpus), BENCH_GATE=str(gate_file),
        VLLM_DP_MASTER_IP="127.0.0.1", VLLM_DP_MASTER_PORT=str(port), LOCKSTEP_VLLM=BACKENDS[backend],
        LOCKSTEP_VLLM_DEADLINE_S=str(options.deadline_s),
    )  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    llm = None
    try:
        from vllm import LLM, SamplingParams

        llm = LLM(**engine_arguments(options, str(Path(folder) / "model")))
        (about,) = llm.collective_rpc("probe_install")
        llm.collective_rpc("probe_weights", args=(0.02,))
        results.put((rank, "about", about))
        barrier.wait(timeout=options.limit_s)

        def generate(count, length, tokens, **sampling):
            """One wave: all ranks begin together. A rank without requests has one of one token, as vLLM needs."""
            prompts = prompts_of(rank, count or 1, length if count else 1)
            wanted = SamplingParams(
                temperature=0.0, max_tokens=tokens if count else 1, ignore_eos=True, detokenize=False, **sampling
            )
            llm.collective_rpc("probe_begin")
            gate_file.write_text(str(len(prompts)))
            barrier.wait(timeout=options.limit_s)
            outputs = llm.generate(prompts, wanted, use_tqdm=False)
            barrier.wait(timeout=options.limit_s)
            (rows,) = llm.collective_rpc("probe_take")
            return rows, [output.outputs[0] for output in outputs]

        generate(1, 8, 40)  # the first run of everything
        if options.fault:
            results.put((rank, "fault", fail(rank, about["pid"], options, llm, SamplingParams, barrier)))
            time.sleep(1)
            os._exit(0)
        # Before anything is timed: what the model says, with the distance of its two best tokens.
        _, outputs = generate(4, 64, COMPARED, logprobs=2)
        said = [
            [(token, gap_of(step)) for token, step in zip(each.token_ids, each.logprobs, strict=True)]
            for each in outputs
        ]
        results.put((rank, "said", said))
        for number, (sizes, lengths) in enumerate(batches(options.gpus)):
            count, length = sizes[rank], lengths[rank]
            generate(count, length, 4)  # kernels of these shapes are built here
            results.put((rank, number, [generate(count, length, options.steps)[0] for _ in range(options.rounds)]))
        barrier.wait(timeout=options.limit_s)
        results.put((rank, "done", None))
    except BaseException:
        results.put((rank, "error", traceback.format_exc()))
    time.sleep(1)
    with contextlib.suppress(BaseException):
        llm.llm_engine.engine_core.shutdown()  # gives the GPU back to what runs next
    os._exit(0)


def gap_of(step):
    """Return the distance of the two best tokens' log-probabilities."""
    best = sorted((entry.logprob for entry in step.values()), reverse=True)
    return round(best[0] - best[1], 4) if len(best) > 1 else float("inf")


def fail(rank, worker, options, llm, sampling, barrier):
    """Generate for long; rank 1's worker gets a signal after two seconds. Return how this rank ended, and when."""
    wanted = sampling(temperature=0.0, max_tokens=4000, ignore_eos=True, detokenize=False)
    barrier.wait(timeout=options.limit_s)
    struck = time.time() + 2
    if rank == 1:
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[options.fault]
        threading.Timer(2.0, os.kill, (worker, number)).start()
    ended = {}

    def run():
        try:
            llm.generate(prompts_of(rank, 8, 64), wanted, use_tqdm=False)
            ended["how"] = "finished"
        except BaseException as error:
            ended["how"] = f"{type(error).__name__}: {error}"
        ended["s"] = round(time.time() - struck, 1)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(options.deadline_s + options.patience_s)
    return dict(ended) or {"how": f"still waiting {options.deadline_s + options.patience_s:g} s later", "s": None}


def evaluate(sizes, by_rank, layers, skipped=4):
    """Return a case's times: medians over its decode steps on each rank, and of these the slowest rank's."""
    found = {name: [] for name in TIMES}
    for rank, rounds in by_rank.items():
        count = sizes[rank]
        if not count:
            continue
        steps, forwards, prefills = [], [], []
        for rows in rounds:
            decode = [i for i, row in enumerate(rows) if row[1] == row[2] == count and i > 0]
            prompts = [i for i, row in enumerate(rows) if row[1] > row[2] or i == 0]
            if len(prompts) == 1 and len(rows) > prompts[0] + 1:
                prefills.append(rows[prompts[0] + 1][3] - rows[prompts[0]][3])
            decode = decode[skipped:]
            steps += [rows[b][0] - rows[a][0] for a, b in itertools.pairwise(decode) if b == a + 1]
            forwards += [rows[a][4] for a in decode]
        for name, values in zip(TIMES, (steps, forwards, prefills), strict=True):
            found[name].append(statistics.median(values) if values else float("nan"))
    record = {name: round(max(values), 3) for name, values in found.items()}
    for name in TIMES[:2]:
        record[f"{name}_per_layer"] = round(record[name] / layers, 4)
    return record


def compare(baseline, other, tolerance):
    """Compare what two backends said, `[ranks][requests][tokens]` of (token, gap).

    After a request's first difference the texts are different ones, so that only what comes before and the gap there
    mean anything.
    """
    equal, compared, gaps = 0, 0, []
    for rank in baseline:
        for one, two in zip(baseline[rank], other[rank], strict=True):
            for (token, gap), (other_token, _) in zip(one, two, strict=True):
                compared += 1
                if token != other_token:
                    gaps.append(gap)
                    break
                equal += 1
    return {
        "benchmark": "vllm_exchange_tokens", "compared": compared, "equal": equal, "differences": len(gaps),
        "largest_gap_at_a_difference": max(gaps, default=0.0), "tolerance": tolerance,
        "as_expected": all(gap <= tolerance for gap in gaps),
    }  # fmt: skip


def run_backend(backend, options, folder):
    """Run all cases with one backend; return what each rank sent: `{what: {rank: value}}`."""
    context = mp.get_context("spawn")
    barrier, results, port = context.Barrier(options.gpus), context.Queue(), free_port()
    ranks = [
        context.Process(target=rank_main, args=(rank, backend, options, folder, port, barrier, results))
        for rank in range(options.gpus)
    ]
    started = time.time()
    for process in ranks:
        process.start()
    found, finished = {}, 0
    while finished < options.gpus:
        try:
            rank, what, value = results.get(timeout=5)
        except queue.Empty:
            if time.time() - started > options.limit_s or not any(process.is_alive() for process in ranks):
                print(f"{backend}: given up after {time.time() - started:.0f} s", file=sys.stderr, flush=True)
                break
            continue
        if what == "error":
            print(f"{backend}, rank {rank}: {value[-3000:]}", file=sys.stderr, flush=True)
            break
        if what == "about" and rank == 0:
            print(
                f"{backend}: ready after {time.time() - started:.0f} s; {json.dumps(value)}",
                file=sys.stderr,
                flush=True,
            )
        finished += what in ("done", "fault")
        found.setdefault(what, {})[rank] = value
    for process in ranks:
        process.join(timeout=20)
    for process in ranks:
        if process.is_alive():
            process.kill()
    for about in found.get("about", {}).values():  # engines that outlived their ranks would keep the GPUs' memory
        with contextlib.suppress(ProcessLookupError):
            os.kill(about["pid"], signal.SIGKILL)
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def said_in_logs(folder, backend):
    """Return the lines of a backend's logs in which Lockstep speaks, each once."""
    lines = set()
    for path in Path(folder).glob(f"{backend}_*.log"):
        for line in path.read_text(errors="replace").splitlines():
            found = re.search(r"(LOCKSTEP_VLLM.*|RankAbsentError.*)", line)
            if found:
                lines.add(found[0][:300])
    return sorted(lines)


def read_options(arguments=None):
    """Return the options of a command line, the process's own by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=4, choices=(2, 4, 8))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=62, help="tokens of each request")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batched-tokens", type=int, default=16384)
    parser.add_argument("--eager", action="store_true", help="no compile, no graphs: a quick first look")
    parser.add_argument("--backends", default="vllm,lockstep", help="which, in this order; ratios are to the first")
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="gap of log-probabilities below which tokens may differ"
    )
    parser.add_argument("--fault", choices=("kill", "stop"), help="what happens to rank 1 in mid-run; times no cases")
    parser.add_argument("--deadline-s", type=float, default=10.0, help="of Lockstep's exchange")
    parser.add_argument("--patience-s", type=float, default=60.0, help="how long to watch beyond the deadline")
    parser.add_argument("--limit-s", type=float, default=280, help="for each backend")
    parser.add_argument("--keep-logs", type=Path, help="copy the ranks' logs into this folder")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main():
    options = read_options()
    import importlib.metadata as metadata

    folder = tempfile.mkdtemp(prefix="bench_vllm_exchange")
    plugins = make_plugins(folder)
    make_model(folder, options.layers)
    path = [str(plugins), str(ROOT / "src"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    sys.path[:0] = path[:3]
    gpu = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    facts = {
        "ranks": options.gpus, "layers": options.layers, "hardware": gpu.stdout.split("\n")[0], "eager": options.eager,
        **{name: metadata.version(name) for name in ("vllm", "torch", "triton")},
    }  # fmt: skip
    records, results = [], {}

    def write(record):
        records.append(record | facts)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")

    failed = False
    try:
        for backend in options.backends.split(","):
            found = results[backend] = run_backend(backend, options, folder)
            about = found.get("about", {}).get(0, {})
            used = {
                "backend": backend,
                "exchange": about.get("exchange"),
                "cudagraph_mode": about.get("cudagraph_mode"),
            }
            for line in said_in_logs(folder, backend):
                print(f"{backend}: {line}", file=sys.stderr, flush=True)
            if options.fault:
                write({
                    "benchmark": "vllm_exchange_fault", "fault": options.fault, "deadline_s": options.deadline_s,
                    "ended": found.get("fault", {}), "log": said_in_logs(folder, backend)[-6:],
                } | used)  # fmt: skip
                failed |= len(found.get("fault", {})) < options.gpus
                continue
            first = next(iter(results))
            if backend != first and "said" in found and "said" in results[first]:
                write(compare(results[first]["said"], found["said"], options.tolerance) | used)
                failed |= not records[-1]["as_expected"]
            for number, (sizes, lengths) in enumerate(batches(options.gpus)):
                if len(found.get(number, {})) < options.gpus:
                    failed = True
                    continue
                record = {"benchmark": "vllm_exchange", "batches": list(sizes), "prompts": list(lengths)}
                record |= evaluate(sizes, found[number], options.layers) | used
                base = next((r for r in records if r.get("backend") == first and r.get("batches") == list(sizes)
                             and r.get("prompts") == list(lengths)), None)  # fmt: skip
                if backend != first and base is not None:
                    record["ratio"] = {name: round(record[name] / base[name], 3) for name in TIMES}
                write(record)
    finally:
        if options.keep_logs:
            options.keep_logs.mkdir(parents=True, exist_ok=True)
            for log in Path(folder).glob("*.log"):
                shutil.copy(log, options.keep_logs)
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"records": records}))
    sys.stdout.flush()
    os._exit(1 if failed else 0)


if __name__ == "__main__":
    main()
