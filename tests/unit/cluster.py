"""All ranks of a run in one process: their schedulers, and what is agreed between them."""

from lockstep.coordination.step import StepRecord, decide
from lockstep.simulation.config import Stop
from lockstep.workload import Arrivals, RankScheduler, SchedulerState
from lockstep.workload.policies import prefills_run


class WorkloadScheduler:
    """The whole workload as one rank of a run sees it: `Arrivals`, prefill alignment and a `RankScheduler`."""

    def __init__(self, requests, config, num_ranks, rank):
        self.arrivals = Arrivals(requests, config, num_ranks, rank)
        self.config, self.num_ranks, self.step = config, num_ranks, 0
        self.scheduler = RankScheduler(config)
        self.assigned = []  # requests given to this rank so far, in order of arrival
        self.arrival_steps = {}  # by request id: the first step that it could have run in
        self.state, self.stop = self.scheduler.state, self.scheduler.stop

    def initial_states(self):
        return [SchedulerState()] * self.num_ranks

    def done(self, states):
        return not self.arrivals.left and not any(state.num_outstanding_tokens for state in states)

    def next_step(self, states):
        for request in self.arrivals.before_step(states):
            self.scheduler.add(request, self.step)
            self.assigned.append(request)
            self.arrival_steps[request.request_id] = self.step
        waits, decoding = [s.prefill_wait_steps for s in states], [s.num_decoding for s in states]
        run_prefills = prefills_run(waits, decoding, self.config.max_prefill_delay_steps)
        self.step += 1
        return self.scheduler.next_step(self.step - 1, run_prefills)

    @property
    def unfinished(self):
        return self.arrivals.left or self.state().num_outstanding_tokens > 0

    def __contains__(self, request_id):
        return request_id in self.scheduler

    def __getattr__(self, name):  # num_free_pages, num_preemptions
        return getattr(self.__dict__["scheduler"], name)


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
