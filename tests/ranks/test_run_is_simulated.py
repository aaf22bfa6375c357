"""The same workload and options give the same counts, step by step, in a real run and in the simulator."""

import pytest
from command import Command

from lockstep.coordination.step_log import StepColumns, read_step_log
from lockstep.simulation.simulator import SimulationConfig, simulate
from lockstep.workload import SchedulerConfig, WorkloadOptions, synthetic_requests

NAMES = (
    *(
        "step",
        "rank",
        "real_rows",
        "prefill_tokens",
        "decode_tokens",
        "prefill_context_tokens",
        "decode_context_tokens",
    ),
    *("num_waiting", "prefills_held", "num_chunks", "dummy_rows", "padding_rows"),
)


@pytest.mark.ranks(4)
def test_counts_of_a_run_are_those_of_the_simulator(tmp_path):
    options = WorkloadOptions(rate_scale=6, length_scale=0.05, num_requests=30)
    scheduler = SchedulerConfig("least-tokens", max_num_batched_tokens=48, max_num_seqs=6, max_prefill_delay_steps=4)
    command = Command(
        *("run", "--no-verify", "--out", tmp_path / "run", "--seed", "3"),
        *("--data-parallel-size", "4", "--requests", "30", "--rate-scale", "6", "--max-chunk-size", "20"),
        *("--load-balancing", "least-tokens", "--max-num-batched-tokens", "48", "--max-num-seqs", "6"),
        *("--max-prefill-delay-steps", "4", "--length-scale", "0.05"),
    )
    assert command.wait(250) == 0
    config = SimulationConfig(4, scheduler, max_chunk_size=20, clock="steps")
    with StepColumns(tmp_path / "simulated") as log:
        simulate(synthetic_requests(None, options, seed=3), config, log)
    ran, simulated = (
        [tuple(getattr(record, name) for name in NAMES) for record in read_step_log(path).records]
        for path in (tmp_path / "run" / "steps.jsonl", tmp_path / "simulated")
    )
    assert ran == simulated
    assert any(row[NAMES.index("prefills_held")] for row in ran)
    assert len({row[NAMES.index("real_rows")] for row in ran}) > 5
