"""What happens to three ranks when one of them breaks: the cases, and the script that every rank runs for each."""

import os
import time
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist

import lockstep
from lockstep.errors import LockstepError
from lockstep.models.parallel import parallel_of
from lockstep.testing import Fault, InjectedFault, inject

GUILTY = 1
DEADLINE_S = 2.0
"""Above what a busy host keeps a rank waiting that is well."""
SHORT_DEADLINE_S = 1.2
LATE_S = 2.2
"""How long a rank is late that comes after the others have given up."""


@dataclass(frozen=True)
class Case:
    """One way in which one rank breaks, and what is expected of the others.

    Attributes:
        fault: what is injected, if anything.
        leave: how the guilty rank's script leaves the block after one call, if that is the fault: raise, return.
        idle: the guilty rank has no rows, and its session's thread takes part for it.
        debug: collectives are compared.
        survivors: the error that all other ranks get, or "" for none.
        guilty: that of the guilty rank; None for a rank that is gone.
        named: the other ranks' error names the guilty rank.
        spoils_own: the guilty rank's own last output may be garbage: it has left out a collective without knowing.
        after: agreements of the block that pass first.
    """

    fault: Fault | None = None
    leave: str = ""
    idle: bool = False
    debug: bool = False
    survivors: str = ""
    guilty: str | None = ""
    named: bool = True
    spoils_own: bool = False
    after: int = field(default=3, compare=False)

    @property
    def name(self) -> str:
        what = f"{self.fault.action} in {self.fault.phase}" if self.fault else f"leaves by {self.leave}"
        if self.fault and self.fault.action in ("delay", "stop"):
            what += f", {self.fault.seconds:g} s"
        if self.fault and self.fault.layer:
            what += f", layer {self.fault.layer}"
        return what + (", idle rank" if self.idle else "") + (", debug" if self.debug else "")


def fault(phase, action, **options):
    return Fault(GUILTY, 0, phase, action, **options)


PHASES = ("agreement", "model", "dispatch", "experts", "combine", "end")


def survivable_cases():
    """Cases after which all ranks' processes live, so that many run one after another."""
    cases = []
    for idle in (False, True):
        for phase in PHASES:
            cases.append(Case(fault(phase, "raise"), idle=idle, survivors="PeerFailedError", guilty="InjectedFault"))
            ctrl_c = fault(phase, "ctrl_c")
            cases.append(Case(ctrl_c, idle=idle, survivors="PeerFailedError", guilty="KeyboardInterrupt"))
            cases.append(Case(fault(phase, "delay", seconds=0.2), idle=idle))
    for phase in ("dispatch", "experts", "combine"):
        for debug in (False, True):
            raised = fault(phase, "raise", layer=1)
            cases.append(Case(raised, debug=debug, survivors="PeerFailedError", guilty="InjectedFault"))
        cases.append(Case(fault(phase, "delay", seconds=0.2, layer=1), debug=True))
    for idle in (False, True):
        cases.append(Case(leave="raise", idle=idle, survivors="PeerFailedError", guilty="InjectedFault"))
        cases.append(Case(leave="return", idle=idle))
        cases.append(Case(leave="exit", idle=idle, survivors="PeerFailedError", guilty="SystemExit"))
        for action in ("corrupted_header", "other_protocol"):
            cases.append(
                Case(fault("agreement", action), idle=idle, survivors="RankMismatchError", guilty="RankMismatchError")
            )
    cases.append(Case(fault("agreement", "wrong_count")))  # taken for a step that is not yet this rank's
    for phase in ("dispatch", "combine"):
        for action in ("skip", "swap", "wrong_size"):
            if (phase, action) == ("combine", "swap"):
                continue  # the two that follow are the combine of one layer and the dispatch of the next
            either = "RankMismatchError|RankAbsentError|PeerFailedError"
            for layer in (0, 1):
                for debug in (True, False):
                    one = fault(phase, action, layer=layer)
                    spoils_own = (phase, action) == ("combine", "skip")
                    cases.append(Case(one, debug=debug, survivors=either, guilty=either, spoils_own=spoils_own))
    return cases


def late_cases():
    """Cases in which a rank comes after the others have given up."""
    cases = []
    for idle in (False, True):
        for phase in PHASES:
            for action in ("delay", "stop"):
                late = fault(phase, action, seconds=LATE_S)
                cases.append(Case(late, idle=idle, survivors="RankAbsentError", guilty="RankAbsentError"))
    return cases


def lethal_cases():
    """Cases in which a rank's process ends."""
    return [
        Case(fault(phase, action), idle=idle, survivors="RankAbsentError", guilty=None)
        for idle in (False, True)
        for action in ("kill", "exit")
        for phase in PHASES
    ]


def prompts(rank, calls=3):
    generator = torch.Generator().manual_seed(rank)
    shapes = [(1 + (rank + call) % 2, 2 + (call + rank) % 4) for call in range(calls)]
    return [torch.randint(0, 256, shape, generator=generator) for shape in shapes]


def generate(model, batch, new_tokens=3):
    mask = torch.ones_like(batch)
    return model.generate(input_ids=batch, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False).tolist()


def expected_outputs(path, rank):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return [generate(whole, batch) for batch in prompts(rank)]


def happens_late(case):
    return case.fault is not None and case.fault.action in ("delay", "stop")


def run_case(model, case, rank, expected):
    """One `join` block with the fault in it, then one without; what this rank saw."""
    parallel = parallel_of(model)
    parallel.debug = case.debug
    if parallel._epoch >= 0:
        parallel.recorder.debug = case.debug
    error, outputs, happened = None, [], []
    idle = case.idle and rank == GUILTY
    try:
        with lockstep.join(model):
            first = parallel.coordinator.step + case.after
            faults = [Fault(**{**asdict(case.fault), "step": first})] if case.fault else []
            with inject(model, *faults) as happened:
                if idle:
                    time.sleep(0.15 if case.leave else 0.2 + (case.fault.seconds if happens_late(case) else 0.2))
                for index, batch in enumerate(prompts(rank)):
                    if rank == GUILTY and case.leave and (idle or index == 1):
                        happened.append(time.monotonic())
                        if case.leave == "raise":
                            raise InjectedFault("left by an exception")
                        if case.leave == "exit":
                            raise SystemExit(3)
                        break
                    outputs.append(generate(model, batch))
    except BaseException as caught:
        error = caught
    ended = time.monotonic()
    message = str(error) if error is not None else ""
    named = getattr(error, "rank", None) == GUILTY or getattr(error, "absent_ranks", ()) == (GUILTY,)
    return {
        "error": type(error).__name__ if error is not None else "",
        "message": message,
        "named": named or "rank 1 differs" in message or "rank 1 sent" in message,
        "happened": happened[0] if happened else None,
        "ended": ended,
        "right": outputs == expected[: len(outputs)],
        "outputs": len(outputs),
        "file": (not isinstance(error, LockstepError)) or "the last steps of rank" not in message
        or os.path.exists(message.rsplit(": ", 1)[1]),
    }  # fmt: skip


def again(model, rank, expected):
    """After a fault: a new block, in which everything must be right."""
    try:
        with lockstep.join(model):
            return "" if [generate(model, batch) for batch in prompts(rank)] == expected else "the outputs differ"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def run_survivable(path, cases, folder, deadline_s=DEADLINE_S):
    """On every rank: all cases, one after another."""
    os.environ["LOCKSTEP_RECORDER_DIR"] = folder
    rank = dist.get_rank()
    model = lockstep.from_pretrained(path, deadline_s=deadline_s)
    expected = expected_outputs(path, rank)
    results = []
    for case in cases:
        dist.barrier()
        result = run_case(model, case, rank, expected)
        dist.barrier()
        result["again"] = again(model, rank, expected)
        results.append(result)
    return results


def run_lethal(path, case, folder):
    """On every rank: one case, after which the guilty rank is gone."""
    os.environ["LOCKSTEP_RECORDER_DIR"] = folder
    rank = dist.get_rank()
    model = lockstep.from_pretrained(path, deadline_s=DEADLINE_S)
    expected = expected_outputs(path, rank)
    dist.barrier()
    started = time.monotonic()
    result = run_case(model, case, rank, expected)
    return {**result, "happened": started}


def verdict(case, results, deadline_s=DEADLINE_S):
    """What is wrong with a case's results, `[ranks]`: a list of sentences, empty if all is well."""
    wrong = []
    happened = next((result["happened"] for result in results if result and result["happened"] is not None), None)
    if happened is None:
        return ["the fault never happened"]
    for rank, result in enumerate(results):
        expected = case.guilty if rank == GUILTY else case.survivors
        if result is None:
            if expected is not None:
                wrong.append(f"rank {rank} is gone")
            continue
        if result["error"] not in (expected or "").split("|"):
            wrong.append(f"rank {rank} got {result['error'] or 'no error'} ({result['message']}), expected {expected}")
        if not result["right"] and not (rank == GUILTY and case.spoils_own):
            wrong.append(f"rank {rank} has a wrong output")
        if rank != GUILTY and expected and case.named and not result["named"]:
            wrong.append(f"rank {rank}'s error does not name rank {GUILTY}: {result['message']}")
        limit = deadline_s + 1
        if rank != GUILTY and expected and result["ended"] - happened > limit:
            wrong.append(f"rank {rank} ended {result['ended'] - happened:.2f} s after the fault, limit {limit:g} s")
        if result.get("again"):
            wrong.append(f"rank {rank} in the next block: {result['again']}")
        if not result["file"]:
            wrong.append(f"rank {rank}: the recorder's file is not there")
    return wrong
