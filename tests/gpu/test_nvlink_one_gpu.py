"""The one-sided kernels with several ranks on one GPU, each a thread with a stream: all but the links, up to 8 ranks.

Set CUDA_MODULE_LOADING=EAGER: a kernel of PyTorch that is loaded lazily while another rank's kernel spins waits for it.
"""

import dataclasses
import os
import threading
import traceback
from types import SimpleNamespace

import pytest
import test_nvlink
import torch

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(NUM_GPUS < 1, reason=f"needs a GPU, found {NUM_GPUS}"),
    pytest.mark.skipif(
        NUM_GPUS > 0 and os.environ.get("CUDA_MODULE_LOADING") != "EAGER", reason="needs CUDA_MODULE_LOADING=EAGER"
    ),
    pytest.mark.timeout(300),
]


class ThreadsOfOneGPU:
    """Memory of ranks that are threads, each with a stream of its own, in the place of `MappedMemory`."""

    def __init__(self, ranks):
        self.ranks = ranks

    def map(self, nbytes, device):
        ranks = self.ranks
        torch.cuda.current_stream().synchronize()
        mine = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        ranks.maps[ranks.rank.value] = mine
        ranks.met.wait()
        self.buffers = [ranks.maps[rank] for rank in range(ranks.size)]
        ranks.met.wait()
        return mine, [buffer.data_ptr() for buffer in self.buffers]

    def synchronize(self, device):
        torch.cuda.current_stream().synchronize()

    def meet(self, deadline_s):
        self.ranks.met.wait()


class Ranks:
    """What a process group is to the dispatcher, for ranks that are threads."""

    def __init__(self, size):
        self.size, self.met, self.rank = size, threading.Barrier(size, timeout=120), threading.local()
        self.maps = {}

    def warm_up(self, dispatcher):
        """Load the kernels one rank after another, with the abort cell set so that none waits.

        A module that is loaded while another thread's kernel spins would wait for that kernel, and it for us.
        """
        rows = torch.empty(0, dispatcher.hidden_size, dtype=torch.bfloat16, device=dispatcher.device)
        ids = torch.empty(0, dispatcher.top_k, dtype=torch.int32, device=dispatcher.device)
        for rank in range(self.size):
            if rank == self.rank.value:
                dispatcher.buffers.mapped[dispatcher.layout.abort :][:8] = 1
                handle = dispatcher.dispatch(dispatcher.route([0] * self.size), rows, ids, ids.float())
                torch.cuda.current_stream().synchronize()
                dispatcher.status.zero_()
                dispatcher.combine(rows, handle)
                torch.cuda.current_stream().synchronize()
                dispatcher.status.zero_()
            self.met.wait()
        dispatcher.reset()


def run(size, *names, **arguments):
    from lockstep.dispatch import nvlink

    ranks, errors = Ranks(size), []

    def dispatcher(**options):
        rank = ranks.rank.value
        group = SimpleNamespace(rank=lambda: rank, size=lambda: size, group_name="ranks on one GPU")
        experts, hidden, capacity = (options[name] for name in ("num_experts", "hidden_size", "max_tokens_per_rank"))
        # All ranks' waiting blocks together leave multiprocessors free: others' kernels may need a whole one.
        sizes = nvlink.launch_sizes(66 // size, size, experts // size, hidden, capacity)
        word_tokens = options["launch"].word_tokens if "launch" in options else 8
        options["launch"] = dataclasses.replace(sizes, skew_tokens=20, chain_round=1, word_tokens=word_tokens)
        memory = ThreadsOfOneGPU(ranks)
        made = nvlink.NvlinkDispatcher(group, share_device=True, memory=memory, warm_up=False, **options)
        ranks.warm_up(made)
        return made

    def work(rank):
        ranks.rank.value = rank
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for name in names:
                    getattr(test_nvlink, name)(rank, size, dispatcher, **arguments)
                    torch.cuda.current_stream().synchronize()
                    ranks.met.wait()
        except BaseException:
            errors.append(f"rank {rank}: {traceback.format_exc()}")
            ranks.met.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(280)
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_random_rounds(size):
    few = [(*shape[:3], min(shape[3], 400), shape[4], 40) for shape in test_nvlink.SHAPES[1:3]]  # each is compiled
    run(size, "_rounds", shapes=few)


@pytest.mark.parametrize("size", [2, 4])
def test_graph_and_errors(size):
    run(size, "_without_checks", "_graph", "_errors")
