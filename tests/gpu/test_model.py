"""A whole model over 2 GPUs: decode steps replayed from CUDA graphs against eager ones, whatever the other rank does.

The same script is run on 2 CPU ranks as well, where no step is a graph: what it checks besides must hold there too.
"""

import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lockstep.testing import run_ranks

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
STEPS, PROMPT = 12, 9
# Of logits, whose standard deviation is about 1 here; bfloat16 keeps 8 bits.
TOLERANCE = 0.06


def _prompt(rank, size, length, seed=0):
    return torch.randint(0, 256, (size, length), generator=torch.Generator().manual_seed(100 * seed + rank))


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
    """What both ranks run."""

    def __init__(self, folder, device, dispatcher):
        from transformers import AutoModelForCausalLM

        import lockstep
        from lockstep.models import graphs

        self.rank, self.cuda, self.join = dist.get_rank(), device.type == "cuda", lockstep.join
        self.whole, model = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval() for _ in range(2)
        )
        self.model = lockstep.parallelize(
            model, dispatcher=dispatcher, max_chunk_size_per_rank=256, deadline_s=60 if self.cuda else 20
        )
        self.parallel = self.model.__dict__["_lockstep_parallel"]
        self.replays = 0
        replay = graphs._CapturedForward.replay

        def counted(*arguments):
            self.replays += 1
            return replay(*arguments)

        graphs._CapturedForward.replay = counted

    def run(self, body, *, graph):
        """Run `body()` in a `join` block; with `graph`, decode steps may be graphs."""
        self.parallel.open()
        kept, self.parallel._graphs = self.parallel._graphs, self.parallel._graphs if graph else None
        with self.join(self.model):
            result = body()
        self.parallel._graphs = kept
        return result

    def check(self, batches, *, meanwhile=None, after=None):
        """Decode eagerly, then three times with graphs; rank 1 does `meanwhile` instead, if that is given.

        Args:
            batches: requests of each rank.
            meanwhile: what a rank with no requests does.
            after: what a rank with requests does when it has decoded.
        """
        size = batches[self.rank]
        decoder = _Decoder(self.model, _prompt(self.rank, size, PROMPT)) if size else None

        def body(tokens=None):
            if decoder is None:
                return meanwhile() if meanwhile is not None else None
            result = decoder(tokens)
            if after is not None:
                after()
            return result

        eager = self.run(body, graph=False)
        before = self.replays
        assert before == 0 or self.cuda
        runs = [self.run(lambda: body(eager[1] if size else None), graph=True) for _ in range(3)]
        if not size:
            if self.cuda:
                assert self.parallel._graphs._idle is not None, "idle steps were not captured"
            return
        alone, _ = _Decoder(self.whole, decoder.ids)(eager[1])
        apart = (alone - eager[0]).norm(dim=-1) / alone.norm(dim=-1)
        # A router that wavers between two experts may fall to the other side; most rows' do not.
        assert apart.median() < 0.03, apart
        for logits, _ in runs:
            torch.testing.assert_close(logits, eager[0], rtol=TOLERANCE, atol=TOLERANCE)
            margin = eager[0].topk(2).values.diff().abs()[..., 0]
            same = logits.argmax(-1) == eager[0].argmax(-1)
            assert bool((same | (margin < TOLERANCE)).all())
        if self.cuda:
            # Of the first run the first step is eager and the second captured; of the others all are replayed.
            assert self.replays - before == 3 * STEPS - 1
        assert torch.equal(runs[1][0], runs[2][0]), "two replays of the same steps differ"

    def barrier(self):
        dist.barrier(device_ids=[self.rank] if self.cuda else None)  # NCCL's, on GPUs
        if self.cuda:
            torch.cuda.synchronize()

    def prefill(self):
        """Prompts of many rows, one after another, while the other rank decodes; each must come out as on its own."""
        for seed in range(5):
            # So few that experts run by the same kernel, and so with the same bits, whichever steps come together.
            ids = _prompt(self.rank, 2, 40, seed).to(self.model.device)
            with torch.no_grad():
                logits, alone = (
                    model(input_ids=ids, use_cache=False).logits.float() for model in (self.model, self.whole)
                )
            apart = (logits - alone).norm(dim=-1) / alone.norm(dim=-1)
            assert apart.median() < 0.03, apart


def _play(folder, device_type, dispatcher):
    rank = dist.get_rank()
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    script = _Script(folder, device, dispatcher)
    script.check((3, 1))  # uneven batches
    script.check((0, 2))  # an idle rank that does nothing at all
    script.check((2, 0), meanwhile=script.prefill)
    # The rank without requests stands in the script's own barrier, to which the other comes after it has decoded.
    script.check((2, 0), meanwhile=script.barrier, after=script.barrier)
    return script.replays


def _child(rank, ranks, folder):
    torch.cuda.set_device(rank)
    store = dist.FileStore(os.path.join(folder, "store"), ranks)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=ranks)
    try:
        replays = _play(os.path.join(folder, "tiny"), "cuda", "nvlink")
        print(f"rank {rank}: {replays} replays", flush=True)
    except BaseException:
        with open(os.path.join(folder, f"error{rank}"), "w") as file:
            file.write(traceback.format_exc())
        os._exit(1)
    os._exit(0)


@pytest.fixture
def folder(tmp_path):
    from lockstep.models.tiny import make_tiny

    make_tiny(tmp_path / "tiny", hidden_size=128, dtype=torch.bfloat16)
    return tmp_path


@pytest.mark.gpu(2)
@pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs of one host, found {NUM_GPUS}")
@pytest.mark.timeout(600)
def test_decode_steps_from_graphs_equal_eager_ones(folder):
    try:
        mp.spawn(_child, (2, str(folder)), nprocs=2)
    except Exception as error:
        text = "\n".join(f"{path.name}\n{path.read_text()}" for path in sorted(folder.glob("error*")))
        raise AssertionError(text or str(error)) from None


@pytest.mark.ranks(2)
def test_the_same_script_on_two_cpu_ranks(folder):
    assert run_ranks(2, _play, str(folder / "tiny"), "cpu", "allgather", deadline_s=100) == [0, 0]
