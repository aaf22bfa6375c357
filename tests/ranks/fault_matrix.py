"""What happens to all ranks when one of them breaks: the cases, and the script that every rank runs for each.

Three ranks, or four of which two share their requests (tensor parallelism).
"""

import os
import time
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.distributed as dist

import lockstep
from lockstep.coordination.groups import connect
from lockstep.errors import LockstepError, RankAbsentError
from lockstep.models.parallel import parallel_of
from lockstep.testing import Fault, InjectedFault, inject, inject_outside
from lockstep.testing.faults import break_on_purpose

GUILTY = 1
NAMES = ("rank 1 differs", "rank 1 sent", "ranks [1], which share its requests")
DEADLINE_S = 2.0
"""Above what a busy host keeps a rank waiting that is well."""
SHORT_DEADLINE_S = 1.2
LATE_S = 2.2
"""How long a rank is late that comes after the others have given up."""
OUTER_LATE_S = 4.2
"""The same outside of steps, to which ranks come at their own times: on a busy host seconds later than the late one."""


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
        tensor_parallel: ranks 0 and 1 share their requests, and so do ranks 2 and 3.
        outside: the rank breaks outside of steps.
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
    tensor_parallel: bool = False
    outside: bool = False
    after: int = field(default=3, compare=False)

    @property
    def name(self) -> str:
        what = f"{self.fault.action} in {self.fault.phase}" if self.fault else f"leaves by {self.leave}"
        if self.outside and self.leave:
            what = f"{self.leave} at the end of its block"
        if self.fault and self.fault.action in ("delay", "stop"):
            what += f", {self.fault.seconds:g} s"
        if self.fault and self.fault.layer:
            what += f", layer {self.fault.layer}"
        what += (", idle rank" if self.idle else "") + (", debug" if self.debug else "")
        return what + (", tensor-parallel" if self.tensor_parallel else "")

    @property
    def outer_deadline_s(self) -> float:
        """Outside of steps: short where a wait must last until it, longer where a rank is seen to be gone."""
        action = self.fault.action if self.fault else self.leave
        return DEADLINE_S + 1 if action in ("kill", "exit") else SHORT_DEADLINE_S

    @property
    def num_ranks(self) -> int:
        return 4 if self.tensor_parallel else 3

    @property
    def tensor_parallel_size(self) -> int:
        return 2 if self.tensor_parallel else 1


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


def tensor_parallel_cases():
    """Survivable cases in which the rank that breaks shares its requests with another one."""
    cases = []
    for idle in (False, True):
        for phase in PHASES:
            cases.append(Case(fault(phase, "raise"), idle=idle, survivors="PeerFailedError", guilty="InjectedFault"))
            ctrl_c = fault(phase, "ctrl_c")
            cases.append(Case(ctrl_c, idle=idle, survivors="PeerFailedError", guilty="KeyboardInterrupt"))
            cases.append(Case(fault(phase, "delay", seconds=0.2), idle=idle))
        cases.append(Case(leave="raise", idle=idle, survivors="PeerFailedError", guilty="InjectedFault"))
        cases.append(Case(leave="exit", idle=idle, survivors="PeerFailedError", guilty="SystemExit"))
        mismatch = {"survivors": "RankMismatchError", "guilty": "RankMismatchError"}
        cases.append(Case(fault("agreement", "corrupted_header"), idle=idle, **mismatch))
    cases.append(Case(leave="return", idle=True))
    # Whoever shares its requests finds out, and the others hear it from that rank.
    cases.append(Case(leave="return", survivors="RankAbsentError|PeerFailedError", guilty="PeerFailedError"))
    for phase in ("dispatch", "experts", "combine"):
        raised = fault(phase, "raise", layer=1)
        cases.append(Case(raised, survivors="PeerFailedError", guilty="InjectedFault"))
    for action in ("skip", "wrong_size"):
        either = "RankMismatchError|RankAbsentError|PeerFailedError"
        cases.append(Case(fault("dispatch", action), debug=True, survivors=either, guilty=either))
    return [replace(case, tensor_parallel=True) for case in cases]


def tensor_parallel_late_cases():
    return [replace(case, tensor_parallel=True) for case in late_cases()]


def tensor_parallel_lethal_cases():
    return [replace(case, tensor_parallel=True) for case in lethal_cases()]


OUTER_PHASES = ("start", "load", "meet", "merge", "leave")
OUTER_ACTIONS = ("raise", "exit", "kill", "stop", "delay")


def outer_cases():
    """Cases in which a rank breaks outside of steps. Each has processes of its own."""
    cases = []
    for phase in OUTER_PHASES:
        for action in OUTER_ACTIONS:
            survivors, guilty = (
                "RankAbsentError",
                {"raise": "InjectedFault", "exit": None, "kill": None}.get(action, "RankAbsentError"),
            )
            if action == "raise" and phase in ("load", "merge", "leave"):  # where the others can be told
                survivors = "PeerFailedError"
            if (phase, action) == ("leave", "delay"):  # a script may take its time: its session answers for it
                survivors = guilty = ""
            if phase == "leave":
                case = Case(leave=action, survivors=survivors, guilty=guilty)
            else:
                case = Case(fault(phase, action, seconds=OUTER_LATE_S), survivors=survivors, guilty=guilty)
            cases.append(replace(case, outside=True))
    return cases + [replace(case, tensor_parallel=True) for case in cases]


def prompts(rank, calls=3):
    generator = torch.Generator().manual_seed(rank)
    shapes = [(1 + (rank + call) % 2, 2 + (call + rank) % 4) for call in range(calls)]
    return [torch.randint(0, 256, shape, generator=generator) for shape in shapes]


def generate(model, batch, new_tokens=3):
    mask = torch.ones_like(batch)
    return model.generate(input_ids=batch, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False).tolist()


def expected_outputs(path, row):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return [generate(whole, batch) for batch in prompts(row)]


def place_of(case, rank):
    """Whose prompts a rank has, and whether they are the guilty rank's."""
    size = case.tensor_parallel_size
    return rank // size, rank // size == GUILTY // size


def happens_late(case):
    return case.fault is not None and case.fault.action in ("delay", "stop")


def load(path, deadline_s, tensor_parallel_size):
    """Load before anything breaks: on a busy host that may take longer than the short deadlines of the cases allow."""
    for _ in range(4):
        try:
            return lockstep.from_pretrained(path, deadline_s=deadline_s, tensor_parallel_size=tensor_parallel_size)
        except RankAbsentError:
            dist.barrier()
    return lockstep.from_pretrained(path, deadline_s=deadline_s, tensor_parallel_size=tensor_parallel_size)


def run_case(model, case, rank, expected):
    """One `join` block with the fault in it, then one without; what this rank saw."""
    parallel = parallel_of(model)
    parallel.debug = case.debug
    if parallel.is_open:
        parallel.peers.debug = case.debug
    error, outputs, happened = None, [], []
    row, shares = place_of(case, rank)
    idle = case.idle and shares
    try:
        with lockstep.join(model):
            first = parallel.coordinator.step + case.after
            faults = [Fault(**{**asdict(case.fault), "step": first})] if case.fault else []
            with inject(model, *faults) as happened:
                if idle:
                    late_s = case.fault.seconds if happens_late(case) and rank == GUILTY else 0.2
                    time.sleep(0.15 if case.leave else 0.2 + late_s)
                # Who shares the requests of a rank that leaves without a call makes none either.
                calls = [] if idle and case.leave and rank != GUILTY else prompts(row)
                for index, batch in enumerate(calls):
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
        "named": named or any(words in message for words in NAMES),
        "happened": happened[0] if happened else None,
        "ended": ended,
        "right": outputs == expected[: len(outputs)],
        "outputs": len(outputs),
        "file": (not isinstance(error, LockstepError)) or "the last steps of rank" not in message
        or os.path.exists(message.rsplit(": ", 1)[1]),
    }  # fmt: skip


def again(model, row, expected):
    """After a fault: a new block, in which everything must be right."""
    try:
        with lockstep.join(model):
            return "" if [generate(model, batch) for batch in prompts(row)] == expected else "the outputs differ"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def run_survivable(path, cases, folder, deadline_s=DEADLINE_S):
    """On every rank: all cases, one after another; of one kind of parallelism."""
    os.environ["LOCKSTEP_RECORDER_DIR"] = folder
    rank = dist.get_rank()
    row, _ = place_of(cases[0], rank)
    model = load(path, deadline_s, cases[0].tensor_parallel_size)
    expected = expected_outputs(path, row)
    results = []
    for case in cases:
        dist.barrier()
        result = run_case(model, case, rank, expected)
        dist.barrier()
        result["again"] = again(model, row, expected)
        results.append(result)
    return results


def run_lethal(path, case, folder):
    """On every rank: one case, after which the guilty rank is gone."""
    os.environ["LOCKSTEP_RECORDER_DIR"] = folder
    rank = dist.get_rank()
    model = load(path, DEADLINE_S, case.tensor_parallel_size)
    expected = expected_outputs(path, place_of(case, rank)[0])
    dist.barrier()
    started = time.monotonic()
    result = run_case(model, case, rank, expected)
    return {**result, "happened": started}


def run_outer(path, case, folder):
    """On every rank: start anew, load, meet, generate, gather, leave; the guilty rank breaks in one of these."""
    os.environ["LOCKSTEP_RECORDER_DIR"] = folder
    rank, size, deadline_s = dist.get_rank(), dist.get_world_size(), case.outer_deadline_s
    expected = expected_outputs(path, place_of(case, rank)[0])
    dist.barrier()
    dist.destroy_process_group()
    error, outputs, happened, entered = None, [], [], time.monotonic()
    faults = [case.fault] if case.fault else []
    try:
        with inject_outside(rank, *faults) as happened:
            connect(dist.FileStore(os.path.join(folder, "start"), size), rank, size, deadline_s)
            entered = time.monotonic()
            model = lockstep.from_pretrained(
                path, deadline_s=deadline_s, tensor_parallel_size=case.tensor_parallel_size
            )
            entered = time.monotonic()
            with lockstep.join(model):
                outputs.append(generate(model, prompts(place_of(case, rank)[0])[0]))
                entered = time.monotonic()
                if rank == GUILTY and case.leave:
                    happened.append(time.monotonic())
                    break_on_purpose(Fault(rank, 0, "end", case.leave, seconds=OUTER_LATE_S))
            entered = time.monotonic()
            with inject(model, *faults) as happened_later:
                parts = parallel_of(model).gather_json("x" * rank)
            happened = happened or happened_later
            assert parts == ["x" * other for other in range(size)]
    except BaseException as caught:
        error = caught
    message = str(error) if error is not None else ""
    return {
        "error": type(error).__name__ if error is not None else "",
        "message": message,
        "named": getattr(error, "rank", None) == GUILTY or getattr(error, "absent_ranks", ()) == (GUILTY,),
        # A rank that is gone cannot say when; the others count from when they came to where it did not.
        "happened": happened[0] if happened else entered if rank != GUILTY else None,
        "entered": entered,
        "ended": time.monotonic(),
        "right": outputs == expected[: len(outputs)],
        "file": True,
    }


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
        since = result.get("entered") or happened
        if rank != GUILTY and expected and result["ended"] - since > limit:
            wrong.append(f"rank {rank} ended {result['ended'] - since:.2f} s after the fault, limit {limit:g} s")
        if result.get("again"):
            wrong.append(f"rank {rank} in the next block: {result['again']}")
        if not result["file"]:
            wrong.append(f"rank {rank}: the recorder's file is not there")
    return wrong
