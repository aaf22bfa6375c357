"""A whole model over the GPUs at hand: decode and prefill with uneven batches, against Transformers and our backends.

Qwen3-30B-A3B's shape with random weights, bfloat16. Every rank first runs its own prompts on the whole model, alone,
and the logits of the parallel model are held against those. Then, in one run:

* with few layers: our `allgather` (NCCL), our `nvlink`, eager and with decode steps as CUDA graphs
* with all layers: `nvlink` with graphs, then eager
* with few layers: Transformers' own expert parallelism (`all_to_all`, FSDP on the dense weights as it demands)
* with all layers: `allgather`, as far as the time goes

    python benchmarks/bench_model.py --gpus 2 --limit-s 255 --commit abc1234 --out results.jsonl

Each record is written when its case is done. The slowest rank counts; medians of rounds (prefill) and of blocks of
steps (decode). `relative_error` is of the logits after the prompt; `replayed_error` of those of decode steps that were
replayed from a graph, against the same steps run eagerly just before; memory is the largest of any rank.
"""

import argparse
import contextlib
import faulthandler
import gc
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from uneven import batches

WARM_STEPS = 3  # not counted: the second decode step of a kind is captured, from the third on it is replayed
CHECKED_STEPS = 6  # decoded twice, eagerly and from a graph, and compared


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
        max_position_embeddings=8192,
        **sizes,
    )


def make_model(config, device):
    """Return the model with the same random weights on every rank, made on the GPU itself."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def make_expert_parallel(config, ranks, device):
    """Return the same model spread by Transformers, as its `from_pretrained` does it between making and loading."""
    from transformers.distributed import DistributedConfig

    wanted = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="all_to_all")
    model = make_model(config, device)
    distributed, _, meshes = type(model).prepare_distribute_model(wanted)
    return type(model).maybe_distribute_model(model, distributed, meshes).eval()


class Run:
    """What all parts of one rank's run share: its place, the time left, where records go."""

    def __init__(self, arguments, rank, started):
        self.arguments, self.rank, self.started = arguments, rank, started
        self.ranks = dist.get_world_size()
        self.kept_s = 0.0  # for what is still to come
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", rank) if cuda else torch.device("cpu")
        self.control = dist.new_group(backend="gloo")  # ours alone: the measured groups carry nothing of it
        self.fields = {
            "ranks": self.ranks,
            "hardware": torch.cuda.get_device_name() if cuda else "cpu",
            "torch": torch.__version__,
            "commit": arguments.commit,
            "date": time.strftime("%Y-%m-%d"),
        }

    def say(self, text):
        """Print on rank 0, with the time since the start."""
        if self.rank == 0:
            print(f"{time.time() - self.started:6.1f} s: {text}", flush=True)

    def sync(self):
        """Wait for this rank's GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def barrier(self):
        """Wait for all ranks."""
        dist.barrier(self.control)

    def largest(self, *values):
        """Return the largest of every rank's values, one by one."""
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control)
        return found.tolist()

    def has_time(self, seconds):
        """Say whether so much time is left; the same on every rank."""
        (spent,) = self.largest(time.time() - self.started)
        return spent + seconds + self.kept_s < self.arguments.limit_s

    def memory(self):
        """Return the peak of this rank's tensors and all that its GPU holds now, bytes."""
        if self.device.type != "cuda":
            return 0, 0
        free, total = torch.cuda.mem_get_info()
        return torch.cuda.max_memory_allocated(), total - free

    def write(self, record):
        """Print a record and append it to the file, on rank 0."""
        if self.rank == 0:
            record = record | self.fields
            self.say(record)
            if self.arguments.out:
                with self.arguments.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")


class Batch:
    """One rank's requests of a case, decoded greedily by one model."""

    def __init__(self, run, model, case, static):
        sizes, lengths = case
        self.run, self.model, self.size = run, model, sizes[run.rank]
        self.ids = prompts_of(run, case, model.config.vocab_size)
        self.cache, self.output = None, None
        if static and self.size:
            from transformers import StaticCache

            steps = max(CHECKED_STEPS, WARM_STEPS + run.arguments.steps * run.arguments.blocks)
            self.cache = StaticCache(config=model.config, max_cache_len=lengths[run.rank] + steps + 1)

    @torch.no_grad()
    def prefill(self):
        """Run the prompts; seconds."""
        if self.cache is not None:
            self.cache.reset()
        self.output = None
        self.run.sync()
        self.run.barrier()
        started = time.perf_counter()
        if self.size:
            self.output = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.run.sync()
        return time.perf_counter() - started

    @torch.no_grad()
    def decode(self, steps, tokens=None):
        """Run so many steps, fed with `tokens` or with the model's own choice; seconds of one, logits, what was fed."""
        logits, fed = [], []
        self.run.sync()
        self.run.barrier()
        started = time.perf_counter()
        for index in range(steps if self.size else 0):
            token = self.output.logits[:, -1:].argmax(-1) if tokens is None else tokens[index]
            self.output = self.model(input_ids=token, past_key_values=self.output.past_key_values, use_cache=True)
            logits.append(self.output.logits[:, -1])
            fed.append(token)
        self.run.sync()
        return (time.perf_counter() - started) / steps, logits, fed


def prompts_of(run, case, vocabulary):
    sizes, lengths = case
    generator = torch.Generator().manual_seed(run.rank)
    shape = (sizes[run.rank], lengths[run.rank])
    return torch.randint(0, vocabulary, shape, generator=generator).to(run.device)


def relative(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def measure(run, name, model, layers, case, reference, joined, graphs):
    """Measure one backend in one case.

    Args:
        run: of this rank.
        name: of the backend.
        model: spread over the ranks.
        layers: how many it has.
        case: requests and prompts.
        reference: logits after this rank's prompts; None without requests.
        joined: makes a context in which the model may be called, with or without graphs.
        graphs: whether decode steps may be replayed from graphs.
    """
    sizes, lengths = case
    arguments = run.arguments
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    batch = Batch(run, model, case, static=graphs)
    replays, replayed_error = 0, 0.0
    if graphs:
        with joined(False):
            batch.prefill()
            _, eager, fed = batch.decode(CHECKED_STEPS)
        with joined(True) as count:
            batch.prefill()
            _, logits, _ = batch.decode(CHECKED_STEPS, fed)
        replays = count()
        # The first step of a kind is eager, of the second on all are replayed.
        errors = [relative(a, b) for a, b in zip(logits, eager, strict=True)]
        replayed_error = max(errors[1:], default=0.0)
        del eager, fed, logits
    with joined(graphs):
        batch.prefill()
        error = relative(batch.output.logits[:, -1], reference) if reference is not None else 0.0
        prefills = [batch.prefill() for _ in range(arguments.rounds)]
        batch.decode(WARM_STEPS)
        blocks = [batch.decode(arguments.steps)[0] for _ in range(arguments.blocks)]
    slowest = [1e3 * value for value in run.largest(*prefills, *blocks)]
    prefill_ms, decode_ms = (
        statistics.median(part) for part in (slowest[: arguments.rounds], slowest[arguments.rounds :])
    )
    peak, held, error, replayed_error, replays = run.largest(*run.memory(), error, replayed_error, replays)
    record = {
        "benchmark": "model", "backend": name, "layers": layers, "batches": list(sizes),
        "prompt": lengths[0] if len(set(lengths)) == 1 else list(lengths), "prefill_ms": round(prefill_ms, 2),
        "prefill_tokens_per_s": round(sum(n * m for n, m in zip(sizes, lengths, strict=True)) / prefill_ms * 1e3),
        "decode_ms": round(decode_ms, 3), "decode_ms_per_layer": round(decode_ms / layers, 4),
        "tokens_per_s": round(sum(sizes) / decode_ms * 1e3, 1),
        # Tokens of a request that is being decoded, in the middle of what was timed, beyond its prompt.
        "decoded": WARM_STEPS + (arguments.steps * arguments.blocks + 1) / 2,
        "relative_error": round(error, 5), "peak_memory_gib": round(peak / 2**30, 2),
        "device_memory_gib": round(held / 2**30, 2),
    }  # fmt: skip
    if graphs:
        record |= {"replayed_error": round(replayed_error, 6), "replays_checked": int(replays)}
    run.write(record)


def measure_cases(run, name, model, layers, cases, references, joined=None, graphs=False):
    """Measure a backend in all cases for which there is time; Transformers' own where `joined` is None."""
    longest = 0.0
    for case, reference in zip(cases, references, strict=True):
        if joined is None and 0 in case[0]:
            continue  # Transformers' experts wait for ever where a rank has nothing to run
        if not run.has_time(1.3 * longest):
            run.say(f"{name}, {layers} layers: no time for {case}")
            return
        started = time.time()
        measure(
            run, name, model, layers, case, reference, joined or (lambda _: contextlib.nullcontext(lambda: 0)), graphs
        )
        longest = max(longest, time.time() - started)
        gc.collect()  # the case's caches, and with them its graphs


def measure_lockstep(run, model, layers, cases, references, names):
    """Measure our backends, one after another, on one model that is spread once."""
    import lockstep
    from lockstep.models import generate_graphs as lockstep_graphs
    from lockstep.models.options import ParallelOptions
    from lockstep.models.parallel import parallel_of

    parallel, opened = parallel_of(model), None
    replays = 0
    replay = lockstep_graphs._CapturedForward.replay

    def counted(*arguments):
        nonlocal replays
        replays += 1
        return replay(*arguments)

    for name in names:
        words = name.split()
        settings = words[0], "fp8" in words
        if settings != opened:
            parallel.close()
            opened = settings
            parallel.options = ParallelOptions(
                run.arguments.max_chunk_size,
                words[0],
                fp8_dispatch="fp8" in words,
                deadline_s=parallel.options.deadline_s,
            )
            parallel.open()
            step_graphs = parallel._graphs
            run.say(f"{name}: open")

        @contextlib.contextmanager
        def joined(with_graphs, step_graphs=step_graphs):
            parallel._graphs = step_graphs if with_graphs else None
            before = replays
            with lockstep.join(model):
                yield lambda: replays - before

        graphs = "graph" in words
        lockstep_graphs._CapturedForward.replay = counted
        plain = [module for module in model.modules() if "forward" not in vars(module)]
        if "norms" in words:
            from lockstep.models.norms import fuse_norms

            run.say(f"{fuse_norms(model)} norms fused")
        measure_cases(run, f"lockstep {name}", model, layers, cases, references, joined, graphs)
        for module in plain:
            vars(module).pop("forward", None)
        lockstep_graphs._CapturedForward.replay = replay
    parallel.close()


def spread(run, layers, cases):
    """Make a model, take the references on the whole of it, and spread it over the ranks by Lockstep."""
    import lockstep

    model = make_model(make_config(layers, run.arguments.tiny), run.device)
    references = []
    with torch.no_grad():
        for case in cases:
            ids = prompts_of(run, case, model.config.vocab_size)
            references.append(model(input_ids=ids, logits_to_keep=1).logits[:, -1].float() if len(ids) else None)
    run.sync()
    run.say(f"model of {layers} layers and its references")
    model = lockstep.parallelize(model, deadline_s=60)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    return model, references


def worker(rank, arguments, store, started):
    faulthandler.dump_traceback_later(arguments.limit_s + 20 - (time.time() - started), exit=True)
    logging.getLogger("lockstep").addHandler(logging.StreamHandler())
    logging.getLogger("lockstep").setLevel(logging.INFO)  # why a step could not be captured
    cuda = torch.cuda.is_available()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(arguments.gpus))
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.FileStore(store, arguments.gpus), rank=rank, world_size=arguments.gpus,
    )  # fmt: skip
    run = Run(arguments, rank, started)
    cases = batches(arguments.gpus)
    if arguments.tiny:
        cases = [(tuple(min(n, 3) for n in sizes), tuple(min(m, 8) for m in lengths)) for sizes, lengths in cases]
    run.say("ranks have met")
    layers, all_layers = arguments.baseline_layers, arguments.layers
    if layers:
        model, references = spread(run, layers, cases)
        measure_lockstep(run, model, layers, cases, references, arguments.backends)
        del model
        gc.collect()
    if all_layers and run.has_time(20):
        model, references_all = spread(run, all_layers, cases)
        run.kept_s = 40.0 if layers and arguments.transformers else 0.0
        measure_lockstep(run, model, all_layers, cases, references_all, arguments.backends_all_layers)
        run.kept_s = 0.0
    if layers and arguments.transformers and run.has_time(10):
        try:
            baseline = make_expert_parallel(make_config(layers, arguments.tiny), arguments.gpus, run.device)
        except (ImportError, AttributeError, TypeError) as error:  # of a Transformers that has it in another form
            run.say(f"Transformers' own expert parallelism is not to be had: {error!r}")
        else:
            run.say("Transformers' own, spread")
            measure_cases(run, "transformers all_to_all", baseline, layers, cases, references)
            del baseline
            gc.collect()
    if all_layers and run.has_time(20):
        measure_lockstep(run, model, all_layers, cases, references_all, arguments.backends_last)
    run.barrier()
    run.say("done")
    os._exit(0)  # groups of the session and of FSDP are in no state to be waited for


def read_options(arguments=None):
    """Return the options of a command line, the process's own by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, choices=(2, 4, 8), help="ranks, with a GPU each")
    parser.add_argument("--layers", type=int, default=48, help="of the second part; 0 leaves it out")
    parser.add_argument("--baseline-layers", type=int, default=8, help="of the first part; 0 leaves it out")
    parser.add_argument("--steps", type=int, default=8, help="decode steps of a block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="of prefill")
    parser.add_argument("--max-chunk-size", type=int, help="rows of a rank per chunk; nvlink's own default otherwise")
    parser.add_argument(
        "--backends", nargs="*", default=["allgather", "nvlink", "nvlink graph"],
        help='of the first part: a dispatcher, and any of "graph" (decode steps as graphs), "fp8" (rows sent in fp8), '
        '"norms" (by fuse_norms=True)',
    )  # fmt: skip
    parser.add_argument("--backends-all-layers", nargs="*", default=["nvlink graph", "nvlink graph norms", "nvlink"])
    parser.add_argument("--backends-last", nargs="*", default=["allgather"], help="likewise, if time is left")
    parser.add_argument("--no-transformers", dest="transformers", action="store_false")
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
