"""What vLLM's workers agree on before they use our exchange, and how they notice one that has stopped."""

import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lockstep.dispatch.collectives import gather_json
from lockstep.integrations import vllm, vllm_exchange
from lockstep.integrations.vllm_step import Exchange
from lockstep.testing import run_ranks

DEADLINE_S = 4.0  # a busy machine may let a thread wait for a second
GRACE_S = 2.0


def stand_in():
    """As much of vLLM as `join` looks at, with the ranks of this run as its expert-parallel group."""
    runner = type("GPUModelRunner", (), dict.fromkeys(("execute_model", "_dummy_run", "sample_tokens"), lambda self: 0))
    group = SimpleNamespace(
        world_size=dist.get_world_size(), rank_in_group=dist.get_rank(), cpu_group=dist.group.WORLD, device_group=None
    )
    for name, attributes in {
        "vllm": {"__version__": "0.33.0"},
        "vllm.distributed": {},
        "vllm.distributed.parallel_state": {"get_ep_group": lambda: group},
        "vllm.v1.worker.gpu_model_runner": {"GPUModelRunner": runner},
    }.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(attributes)


class Idle:
    """A dispatcher that is never used."""

    max_tokens_per_rank = 8

    def check(self):
        pass


def join_layer(maps=True, **changes):
    """Join a layer whose configuration has these changes; return what runs its rows, and what was said."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    parallel = SimpleNamespace(
        use_ep=True, dp_size=num_ranks, pcp_size=1, ep_size=num_ranks, ep_rank=rank, sp_size=1,
        is_sequence_parallel=False, enable_eplb=False,
    )  # fmt: skip
    moe = SimpleNamespace(
        moe_parallel_config=parallel, activation="silu", in_dtype=torch.bfloat16, has_bias=False, is_lora_enabled=False,
        num_experts=6, hidden_dim=16, hidden_dim_unpadded=None, experts_per_token=2, max_num_tokens=64,
        max_capture_size=8,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(parallel if hasattr(parallel, name) else moe, name, value)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, expert_placement_strategy="linear"
        ),
        model_config=None,
    )
    method = SimpleNamespace(unquantized_backend=SimpleNamespace(name="TRITON"))
    experts = 6 // num_ranks
    layer = SimpleNamespace(
        w13_weight=torch.zeros(experts, 16, moe.hidden_dim, dtype=torch.bfloat16),
        w2_weight=torch.zeros(experts, moe.hidden_dim, 8, dtype=torch.bfloat16),
    )

    def make(moe, shape, group, experts):
        dispatcher = Idle()
        return Exchange(dispatcher, dispatcher, rank=rank, deadline_s=DEADLINE_S)

    vllm.TOLD.clear()
    run = vllm_exchange.join(
        config, moe, method, layer, facts=lambda device: ["host", f"GPU-{rank}"] if maps else None, make=make
    )
    return run, [text.removeprefix("LOCKSTEP_VLLM=exchange: ") for text in vllm.TOLD]


def layers():
    rank = dist.get_rank()
    stand_in()
    said = []
    for changes in (
        {"maps": rank != 2},
        {"max_num_tokens": 64 << (rank == 1)},
        {"hidden_dim": 16 + 16 * (rank == 2)},
        {"has_bias": rank == 1},
        {"enable_eplb": True},
        {},
        {},
    ):
        run, told = join_layer(**changes)
        said.append((run is not None, *told))
    return said, len(vllm_exchange.STEP.exchanges), [path.name for path in Path("/dev/shm").glob(f"*-{os.getpid()}-*")]


@pytest.mark.ranks(3)
def test_ranks_that_differ_know_it_before_rows_move_and_all_take_one_way():
    kept = "vLLM's own path stays: "
    for said, num_exchanges, left in run_ranks(3, layers):
        *refused, first, second = said
        joined = "over 8, not on one host, or not all joined by NVLink"
        experts = [f"EP rank {rank}: [6, {16 + 16 * (rank == 2)}, 2, 'torch.bfloat16']" for rank in range(3)]
        rows = "EP rank 0: [8, 64], EP rank 1: [8, 128], EP rank 2: [8, 64]"
        assert refused == [
            (False, f"{kept}the ranks' GPUs cannot map each other's memory: {joined}"),
            (False, f"{kept}ranks disagree about the rows of a step: {rows}"),
            (False, f"{kept}ranks disagree about the experts: {', '.join(experts)}"),
            (False, f"{kept}experts with biases (on EP rank 1)"),
            (False, f"{kept}EPLB moves experts between ranks (enable_eplb) (on EP rank 0)"),
        ]
        assert first[0]
        assert first[1].startswith("6 routed experts on 3 ranks go through Lockstep's exchange")
        assert second == (True,)  # the same exchange
        assert num_exchanges == 1
        assert left == []


def one_stops():
    rank, group = dist.get_rank(), dist.group.WORLD
    stand_in()
    os.environ[vllm_exchange.DEADLINE] = str(DEADLINE_S)
    run, _ = join_layer()
    assert run is not None
    step = vllm_exchange.STEP
    step.begin(1)
    ended = []
    # The watch that joins started would end this process; another, on the same board, only says so.
    watch = type(step.watch)(step, step.watch.board, rank, DEADLINE_S, end=ended.append, grace_s=GRACE_S)
    step.watch.deadline_s = 1e9
    watch.start()
    pids = gather_json(os.getpid(), group)
    time.sleep(0.5)
    if rank == 0:
        os.kill(pids[2], signal.SIGSTOP)

    def step_that_waits():
        began = time.monotonic()
        while not ended and time.monotonic() - began < 30:
            time.sleep(0.05)
        return time.monotonic() - began

    vllm.TOLD.clear()
    took_s = step.within(step_that_waits) if rank < 2 else 0.0
    if rank == 0:
        time.sleep(2.0)  # rank 1 has seen it too
        os.kill(pids[2], signal.SIGCONT)
    dist.barrier(group)  # where rank 2 is when it is stopped
    return took_s, sorted(vllm.TOLD)


@pytest.mark.ranks(3)
def test_a_rank_that_is_stopped_is_named_by_the_others_within_the_deadline_and_grace():
    results = run_ranks(3, one_stops)
    for rank in (0, 1):
        took_s, told = results[rank]
        assert DEADLINE_S <= took_s < DEADLINE_S + GRACE_S + 3
        silent = f"silent for 4 s while EP rank {rank} is in a step: EP rank 2; its process is stopped"
        assert told == [f"LOCKSTEP_VLLM=exchange: {silent}"]
    assert results[2][1] == []
