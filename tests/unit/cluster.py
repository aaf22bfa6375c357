"""All ranks of a run in one process: their schedulers, and what is agreed between them."""

from lockstep.coordination.step import StepRecord, decide
from lockstep.simulation.config import Stop
from lockstep.workload import WorkloadScheduler


def run_cluster(requests, config, num_ranks, stop_before=()):
    """What the ranks of a real run would do: one scheduler each, states exchanged, decide() in between.

    `stop_before` has (step, request, overrun rows) of requests that end early, where they are unfinished by then.
    """
    ranks = [WorkloadScheduler(requests, config, num_ranks, rank) for rank in range(num_ranks)]
    states = ranks[0].initial_states()
    steps, stops, sampled = [], {}, dict.fromkeys((request.request_id for request in requests), 0)
    while not ranks[0].done(states):
        for step, request_id, overrun in stop_before:
            rank = next((scheduler for scheduler in ranks if request_id in scheduler), None)
            if step == len(steps) and rank is not None:
                rank.stop([request_id])
                stops[request_id] = Stop(step, max(0, sampled[request_id] - overrun))
        plans = [scheduler.next_step(states) for scheduler in ranks]
        decision = decide([StepRecord(num_tokens=plan.num_tokens) for plan in plans])
        assert decision.num_tokens_across_dp == tuple(plan.num_tokens for plan in plans)
        states = [scheduler.state() for scheduler in ranks]
        steps.append(plans)
        for entry in (entry for plan in plans for entry in plan.entries):
            sampled[entry.request_id] += entry.samples
    for step, request_id, overrun in stop_before:
        if step == 0 and overrun and sampled[request_id] == by_id(requests)[request_id].max_new_tokens > 1:
            stops[request_id] = Stop(None, sampled[request_id] - 1)  # its last row was planned before it ended
    return steps, ranks, stops


def by_id(requests):
    return {request.request_id: request for request in requests}


def overrun_rows(steps, requests, stops):
    """Rows whose token is not kept, [steps][ranks]."""
    kept = {
        i: stops[i].num_new_tokens if i in stops else request.max_new_tokens for i, request in by_id(requests).items()
    }
    found, sampled = [], dict.fromkeys(kept, 0)
    for plans in steps:
        found.append([0] * len(plans))
        for rank, plan in enumerate(plans):
            for entry in plan.entries:
                sampled[entry.request_id] += entry.samples
                found[-1][rank] += entry.samples and sampled[entry.request_id] > kept[entry.request_id]
    return found
