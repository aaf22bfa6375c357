"""An engine of one's own, from public names alone: `torchrun --nproc-per-node 2 examples/tiny_engine.py`.

Each rank has rows of its own in every step, or none; two MoE layers run them through experts that are spread over the
ranks. What a rank does in a step depends on what all ranks agreed on, and on nothing else.
"""

import torch
import torch.distributed as dist

from lockstep import (
    Coordinator,
    DispatcherOptions,
    ExpertsShape,
    LocalExperts,
    MoELayer,
    MoELayers,
    ParallelConfig,
    StepRecord,
    make_dispatcher,
)

SHAPE = ExpertsShape(num_experts=8, hidden_size=16, top_k=2)
ROWS = [[3, 5], [0, 2], [4, 0]]  # of each rank, step by step; a third rank would have none


def make_layers(group, coordinator):
    """Two layers that share a dispatcher, with this rank's share of the experts."""
    config = ParallelConfig(data_parallel_size=group.size(), data_parallel_rank=group.rank())
    dispatcher = make_dispatcher("allgather", group, SHAPE, DispatcherOptions(deadline_s=10))
    generator = torch.Generator().manual_seed(group.rank())
    layers = []
    for _ in range(2):
        gate_up = torch.randn(dispatcher.num_local_experts, 48, 16, generator=generator) / 4
        down = torch.randn(dispatcher.num_local_experts, 16, 24, generator=generator) / 5
        layers.append(MoELayer(LocalExperts.from_tensors(gate_up, down), dispatcher, config, SHAPE))
    return MoELayers(layers, coordinator=coordinator, max_chunk_size_per_rank=4)


def run(group):
    """Run all steps and return each one's output."""
    coordinator = Coordinator(group, deadline_s=10)
    layers = make_layers(group, coordinator)
    outputs = []
    for number, counts in enumerate(ROWS):
        mine = counts[group.rank()] if group.rank() < len(counts) else 0
        decision = coordinator.agree(StepRecord(num_tokens=mine, unfinished=number + 1 < len(ROWS)))
        rows = torch.randn(mine, 16, generator=torch.Generator().manual_seed(10 * number + group.rank()))
        with layers.begin(decision.num_tokens_across_dp) as step:
            for index in range(len(layers)):
                ids = torch.rand(mine, 8, generator=torch.Generator().manual_seed(index)).topk(2).indices
                rows = rows + step.run_layer(index, rows, ids, torch.full((mine, 2), 0.5))
        step.wait()
        outputs.append(rows)
    return outputs


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for number, rows in enumerate(run(dist.group.WORLD)):
        print(f"rank {dist.get_rank()}, step {number}: {len(rows)} rows, norm {float(rows.norm()):.3f}", flush=True)
    dist.destroy_process_group()
