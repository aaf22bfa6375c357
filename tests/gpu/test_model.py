"""A whole model over GPUs: decode steps replayed from CUDA graphs against eager ones, whatever other ranks do.

The same script is run on CPU ranks as well, where no step is a graph: what it checks besides must hold there too.
"""

import contextlib
import faulthandler
import logging
import os
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dispatch_rounds import round_to_fp8, undo_scales
from lockstep.models.experts_modules import find_experts
from lockstep.moe.step import Step
from lockstep.testing import run_ranks
from many_ranks import ranks_for, repeated
from mapped import stand_in

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NUM_RANKS = ranks_for(NUM_GPUS)
STEPS, PROMPT = 12, 9
# Of logits, whose standard deviation is about 1 here; bfloat16 keeps 8 bits.
TOLERANCE = 0.06
# Of the logits' length, the median over rows. A router that wavers between two experts may fall to the other side; most
# rows' do not. In fp8, whose steps are 16 times bfloat16's, rounding makes of a difference d one of sqrt(d * step), the
# geometric mean of bfloat16's error and fp8's own: 0.04 of 0.015 and 0.1, measured on CPU ranks.
LOGITS_OFF, LOGITS_OFF_FP8 = 0.03, 0.08
# Of one MoE layer's result, from the same rows: bfloat16's roundings. A value halfway between two of fp8's may fall to
# the other side, of which a row's error in fp8 (0.04 in the median, 0.065 at most) is the measure.
LAYER_OFF, LAYER_OFF_WORST = 0.01, 0.1
LIMIT_S = 110  # after which each rank shows where it stands


def _prompt(rank, size, length, seed=0):
    return torch.randint(0, 256, (size, length), generator=torch.Generator().manual_seed(100 * seed + rank))


def _off(found, expected):
    """By how much each row of logits is off, relative to the expected row's length."""
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


@contextlib.contextmanager
def _recorded(model):
    """Yield what the model's experts are called with and return, `(layer, arguments, result)` in order of the calls."""
    calls, hooks = [], []
    for layer, (_, module) in enumerate(find_experts(model)):

        def record(_, arguments, result, layer=layer):
            calls.append((layer, [argument.clone() for argument in arguments], result.clone()))

        hooks.append(module.register_forward_hook(record))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class _Decoder:
    """Prompt and greedy decoding over one cache of fixed size, which is used again, so that its graph is too."""

    def __init__(self, model, ids):
        from transformers import StaticCache

        self.model, self.ids = model, ids.to(model.device)
        self.cache = StaticCache(config=model.config, max_cache_len=PROMPT + STEPS + 1)

    @torch.no_grad()
    def __call__(self, tokens=None):
        """Return the logits after the prompt and after each token, `[STEPS + 1, batch, vocabulary]`, and the tokens.

        Args:
            tokens: fed instead of the model's own choice, `[STEPS, batch, 1]`.
        """
        self.cache.reset()
        output = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True)
        logits, fed = [output.logits[:, -1].float().cpu()], []
        for step in range(STEPS):
            fed.append(output.logits[:, -1:].argmax(-1) if tokens is None else tokens[step])
            output = self.model(input_ids=fed[-1], past_key_values=self.cache, use_cache=True)
            logits.append(output.logits[:, -1].float().cpu())
        return torch.stack(logits), fed


class _Script:
    """What all ranks run."""

    def __init__(self, folder, device, dispatcher, fp8=False):
        from transformers import AutoModelForCausalLM

        import lockstep

        self.rank, self.cuda, self.join, self.fp8 = dist.get_rank(), device.type == "cuda", lockstep.join, fp8
        self.whole, model = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval() for _ in range(2)
        )
        self.model = lockstep.parallelize(
            model, dispatcher=dispatcher, fp8_dispatch=fp8, max_chunk_size_per_rank=256, deadline_s=30
        )
        self.parallel = lockstep.parallel_of(self.model)
        self.replays = self.idle_replays = 0
        replay = torch.cuda.CUDAGraph.replay

        def counted(graph):
            idle = threading.current_thread().name == "lockstep-session"
            self.replays, self.idle_replays = self.replays + (not idle), self.idle_replays + idle
            return replay(graph)

        torch.cuda.CUDAGraph.replay = counted

    def run(self, body, *, graph):
        """Run `body()` in a `join` block; with `graph`, decode steps may be graphs."""
        captures = Step.captures
        Step.captures = captures if graph else False
        try:
            with self.join(self.model):
                return body()
        finally:
            Step.captures = captures

    def check(self, title, batches, *, meanwhile=None, after=None):
        """Decode eagerly, then three times with graphs; ranks without requests do `meanwhile` instead, if it is given.

        Args:
            title: for messages.
            batches: requests of each rank.
            meanwhile: what a rank with no requests does.
            after: what a rank with requests does when it has decoded.
        """
        began, size = time.time(), batches[self.rank]
        title = f"{title}, rank {self.rank} of {batches}"
        decoder = _Decoder(self.model, _prompt(self.rank, size, PROMPT)) if size else None

        def body(tokens=None):
            if decoder is None:
                return meanwhile() if meanwhile is not None else None
            result = decoder(tokens)
            if after is not None:
                after()
            return result

        with _recorded(self.model) as calls:
            eager = self.run(body, graph=False)
        before, idle_before = self.replays, self.idle_replays
        assert before == idle_before == 0 or self.cuda
        runs = [self.run(lambda: body(eager[1] if size else None), graph=True) for _ in range(3)]
        if self.rank == 0:
            print(f"{title}: {time.time() - began:.1f} s", flush=True)
        if not size:
            assert not self.cuda or self.idle_replays > idle_before, f"{title}: no idle step was replayed"
            return
        self._check_layers(title, calls)
        with self._rounded_rows(calls) if self.fp8 else contextlib.nullcontext():
            alone, _ = _Decoder(self.whole, decoder.ids)(eager[1])
        apart = _off(eager[0], alone)
        limit = LOGITS_OFF_FP8 if self.fp8 else LOGITS_OFF
        assert apart.median() < limit, (
            f"{title}: eager logits are off from the whole model's by {apart.median():.3f} in the median, at most "
            f"{limit} were expected; by step: {apart.amax(1).tolist()}"
        )
        if self.cuda:
            # Of the first run the first step is eager and the second captured; of the others all are replayed.
            replays, wanted = self.replays - before, 3 * STEPS - 1
            assert replays == wanted, f"{title}: {replays} steps were replayed, {wanted} were expected"
        for number, (logits, _) in enumerate(runs):
            apart = _off(logits, eager[0])
            worst = (logits - eager[0]).abs().amax(-1)
            margin = eager[0].topk(2).values.diff().abs()[..., 0]
            other = (logits.argmax(-1) != eager[0].argmax(-1)) & (margin >= TOLERANCE)
            assert worst.max() <= TOLERANCE * (1 + eager[0].abs().max()) and not other.any(), (
                f"{title}: run {number} with graphs differs from eager by {worst.max():.3f}, relatively by step (0 is "
                f"the prompt) {[round(value, 4) for value in apart.amax(1).tolist()]}, other tokens in steps "
                f"{other.any(1).nonzero().flatten().tolist()}"
            )
        same = (runs[1][0] == runs[2][0]).flatten(1).all(1)
        # What others bring meanwhile may put a row into another tile of the experts' products.
        assert meanwhile == self.prefill or bool(same.all()), (
            f"{title}: two replays of the same steps have other bits, in steps {(~same).nonzero().flatten().tolist()}"
        )

    def sent(self, rows):
        return undo_scales(*round_to_fp8(rows)).to(rows.dtype) if self.fp8 else rows

    @torch.no_grad()
    def _check_layers(self, title, calls):
        """Compare each MoE layer's results with the whole model's experts, called with the same rows as they are sent.

        No error of an earlier layer comes in, and no router: so this is sharp where a whole model's logits are not.
        """
        experts = [module for _, module in find_experts(self.whole)]
        assert len(calls) == len(experts) * (STEPS + 1), f"{title}: {len(calls)} calls"
        apart = [
            _off(result.float(), experts[layer](self.sent(rows), *routing).float())
            for layer, (rows, *routing), result in calls
        ]
        each = torch.cat(apart)
        by_layer = [round(float(torch.cat(apart[layer :: len(experts)]).median()), 4) for layer in range(len(experts))]
        assert each.median() < LAYER_OFF and each.max() < LAYER_OFF_WORST, (
            f"{title}: the MoE layers' results are off by {each.median():.4f} in the median and {each.max():.4f} at "
            f"most, {LAYER_OFF} and {LAYER_OFF_WORST} were expected; median by layer {by_layer}"
        )

    @contextlib.contextmanager
    def _rounded_rows(self, calls):
        """Give the whole model's experts rows as they are sent, and these calls' routing.

        Of a tiny random model's routers too many would waver, and each that falls to the other side makes other logits.
        """
        routings = iter([routing for _, (_, *routing), _ in calls])
        hooks = [
            module.register_forward_pre_hook(lambda _, arguments: (self.sent(arguments[0]), *next(routings)))
            for _, module in find_experts(self.whole)
        ]
        yield
        for hook in hooks:
            hook.remove()

    def barrier(self):
        dist.barrier(device_ids=[self.rank] if self.cuda else None)  # NCCL's, on GPUs
        if self.cuda:
            torch.cuda.synchronize()

    def prefill(self):
        """Prompts of many rows, one after another, while other ranks decode; each must come out as on its own."""
        for seed in range(5):
            # So few that experts run by the same kernel, and so with the same bits, whichever steps come together.
            ids = _prompt(self.rank, 2, 40, seed).to(self.model.device)
            with torch.no_grad():
                logits, alone = (
                    model(input_ids=ids, use_cache=False).logits.float() for model in (self.model, self.whole)
                )
            apart = _off(logits, alone)
            assert apart.median() < LOGITS_OFF, (
                f"rank {self.rank}: prompt {seed} is off from the whole model's logits by {apart.median():.3f} in the "
                f"median, at most {LOGITS_OFF} were expected"
            )


def _play(folder, device_type, dispatcher):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    script = _Script(folder, device, dispatcher)
    script.check("uneven batches", repeated((3, 1, 2, 1), ranks))
    script.check("an idle rank that does nothing at all", repeated((0, 2, 0, 1), ranks))
    script.check("a rank that prefills meanwhile", repeated((2, 0, 1, 1), ranks), meanwhile=script.prefill)
    # A rank without requests stands in the script's own barrier, to which others come after they have decoded.
    script.check(
        "a rank in an NCCL barrier", repeated((2, 0, 1, 0), ranks), meanwhile=script.barrier, after=script.barrier
    )
    replays = script.replays
    if device_type == "cpu":
        stand_in()  # rows in fp8 need the GPU's dispatcher
    for title, name, fp8 in (("rows in fp8", "nvlink", True), ("the backend chosen by itself", "auto", False)):
        script.parallel.close()
        script = _Script(folder, device, name, fp8)
        script.check(title, repeated((2, 1, 0, 2), ranks))
        replays += script.replays
    return replays


def _child(rank, ranks, folder):
    with Path(folder, f"stack{rank}").open("w") as stack:
        faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=stack)
        logging.basicConfig(level=logging.INFO)  # why a step could not be captured
        torch.cuda.set_device(rank)
        store = dist.FileStore(os.path.join(folder, "store"), ranks)
        dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=ranks)
        try:
            replays = _play(os.path.join(folder, "tiny"), "cuda", "nvlink")
            print(f"rank {rank}: {replays} replays", flush=True)
        except BaseException:
            Path(folder, f"error{rank}").write_text(traceback.format_exc())
            time.sleep(2)  # for what the others have to say of it
            os._exit(1)
        os._exit(0)


@pytest.fixture
def folder(tmp_path):
    from lockstep.models.tiny import make_tiny

    make_tiny(tmp_path / "tiny", hidden_size=128, dtype=torch.bfloat16)
    return tmp_path


@pytest.mark.gpu(2)
@pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs of one host, found {NUM_GPUS}")
@pytest.mark.timeout(150)
def test_decode_steps_from_graphs_equal_eager_ones(folder):
    try:
        mp.spawn(_child, (NUM_RANKS, str(folder)), nprocs=NUM_RANKS)
    except Exception as error:
        found = [path for name in ("error", "stack") for path in sorted(folder.glob(f"{name}*"))]
        text = "\n".join(f"{path.name}\n{path.read_text()}" for path in found if path.stat().st_size)
        raise AssertionError(text or str(error)) from None


@pytest.mark.ranks(2)
def test_the_same_script_on_two_cpu_ranks(folder):
    assert run_ranks(2, _play, str(folder / "tiny"), "cpu", "allgather", deadline_s=100) == [0, 0]
