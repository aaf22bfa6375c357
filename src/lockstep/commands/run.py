"""What `lockstep run` does around a run: checks beforehand, progress, verification, table and report."""

import json
import logging
import os
import shlex
import signal
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from lockstep.commands.folder import output_folder
from lockstep.coordination.environment import environment_number
from lockstep.errors import ConfigurationError, LockstepError
from lockstep.report.terminal import Terminal, progress
from lockstep.runner.clock import expected_duration
from lockstep.runner.options import PARTS, RANKS_PER_CORE, RunOptions
from lockstep.steplog.files import read_step_log
from lockstep.steplog.record import StepLogRecord, summarize
from lockstep.workload import load_workload

if TYPE_CHECKING:
    from lockstep.runner.run import Progress as RunProgress
    from lockstep.runner.verify import Verification

_TINY_EXPERTS = 16
_OPTIONS = ("clock", "model", "workload", "data_parallel_size", "tensor_parallel_size", "max_chunk_size", "seed", "out")
# What was chosen for the run, of what its engine says of itself.
_CHOSEN = (
    *("dispatcher", "dispatcher_note", "dtype", "device", "attention_name", "layers", "graphs", "graphs_note"),
    *("max_model_len", "kv_capacity_tokens"),
)


@dataclass(frozen=True)
class RunCommand:
    """What the command line asked for; `options.out` is empty for a new folder under `runs/`.

    `max_restarts` says how often ranks of this host are started again after one has died; torchrun has its own option.
    """

    options: RunOptions
    verify: bool
    overwrite: bool
    as_json: bool
    arguments: list[str]
    max_restarts: int = 0


def execute(command: RunCommand) -> int:
    """Do it all, and return the exit status: 0 done and equal, 1 outputs differ.

    Ends the process with 130 when interrupted, and with 143 when asked to end by SIGTERM, once all ranks have ended.

    Raises:
        ConfigurationError: options that cannot work; before any rank is started, and under torchrun on every rank.
        LockstepError: the run failed.
    """
    rank, under_torchrun = environment_number("RANK", 0, default=0), "RANK" in os.environ
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: %(levelname)s %(name)s: %(message)s")
    console = Terminal(stderr=True)
    options = command.options
    _check_options(options, console)
    _check_checkpoint(options)
    _check_machine(options)
    _check_model_and_workload(options)
    with output_folder(options.out or _dated_folder(), command.overwrite, _torchrun_id()) as out:
        options = replace(options, out=str(out))
        if options.model == "tiny":
            options = replace(options, model=_tiny(out, rank, options))
        return _run(command, options, console, under_torchrun, rank)


def _run(command: RunCommand, options: RunOptions, console: Console, under_torchrun: bool, rank: int) -> int:
    from lockstep.runner.launcher import launch

    started = time.perf_counter()
    if not under_torchrun:  # which sends it to ranks as well whose peer has failed: they need not say anything
        with suppress(ValueError):  # only the main thread takes signals
            signal.signal(signal.SIGTERM, _terminated)
    try:
        if under_torchrun:
            result = run_one_rank(options)
            if rank != 0:
                return 0
        else:
            console.print(f"starting {options.world_size} ranks on this host", style="dim")
            restarts, deadline_s = command.max_restarts, options.deadline_s
            result = launch(options.world_size, run_one_rank, options, max_restarts=restarts, deadline_s=deadline_s)
        return _finish(command, options, result, console)
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, _Terminated)
        seconds = time.perf_counter() - started
        _say_how_far("terminated" if terminated else "interrupted", Path(options.out), console, seconds)
        sys.stderr.flush()
        os._exit(143 if terminated else 130)  # nothing is left to write, and unloading torch takes most of a second


class _Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, but for the word and the exit status."""


def _terminated(*_: object) -> NoReturn:
    raise _Terminated


def run_one_rank(options: RunOptions) -> dict[str, Any]:
    """Run one rank; rank 0 shows the progress of all on stderr. Started in a process of its own."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: %(levelname)s %(name)s: %(message)s")
    _quiet_transformers()
    from lockstep.report.metrics import RunMetrics
    from lockstep.runner import run as runner
    from lockstep.runner.ranks import describe

    if rank != 0:
        return runner.run_rank(options)
    console = Terminal(stderr=True)
    with ExitStack() as stack:
        metrics = None
        if options.metrics_port is not None:
            metrics = stack.enter_context(RunMetrics(options.metrics_port))
            console.print(f"metrics: http://127.0.0.1:{metrics.port}/metrics", style="dim")
        show = stack.enter_context(progress(console, "running", None))
        show(0, now="loading the model")

        def observe(seen: "RunProgress") -> None:
            if metrics is not None:
                metrics.observe(seen.num_tokens_across_dp, seen.agreement_s)
            rows = " ".join(f"{count:>4}" for count in seen.num_tokens_across_dp[:16])
            show(seen.rows_done, seen.rows_total, f"step {seen.step}, rows {rows}")

        def say(about: dict[str, Any]) -> None:
            console.print(describe(about, options.world_size), style="dim", soft_wrap=True)

        return runner.run_rank(options, observe, say)


def _check_options(options: RunOptions, console: Console) -> None:
    """What needs neither torch nor a model, beyond what the command line has checked: said at once."""
    if options.workload != "synthetic" and (not os.path.exists(options.workload) or os.path.isdir(options.workload)):
        raise ConfigurationError(f"no workload at {options.workload}: there is no such file")
    most_ranks = RANKS_PER_CORE * (os.cpu_count() or 1)
    if "RANK" not in os.environ and options.world_size > most_ranks:
        raise ConfigurationError(
            f"{options.world_size} ranks on this host, but at most {most_ranks} are started on its "
            f"{os.cpu_count()} cores: use torchrun on several hosts"
        )
    if "RANK" in os.environ:
        started = environment_number("WORLD_SIZE", 0, default=0)
        if started != options.world_size:
            raise ConfigurationError(
                f"torchrun started {started} ranks, but data_parallel_size * tensor_parallel_size is "
                f"{options.world_size}"
            )
    trace = load_workload(options.workload, options.workload_options, options.seed)
    options.scheduler.check_fits(trace.requests)
    if os.environ.get("RANK", "0") != "0":
        return
    if options.clock == "wall":
        console.print(expected_duration(trace.requests), style="dim", soft_wrap=True)
    if options.metrics_port is not None:
        from lockstep.report.metrics import RunMetrics

        RunMetrics(options.metrics_port).close()  # a port that cannot be used is said now, not when ranks have started
    if trace.left_out:
        console.print(trace.left_out, style="yellow", soft_wrap=True)


def _check_machine(options: RunOptions) -> None:
    from lockstep.coordination.groups import own_device
    from lockstep.dispatch.choose import check_dispatcher

    own_device(options.device)
    check_dispatcher(options.dispatcher, device_type=own_device(None).type)


def _check_model_and_workload(options: RunOptions) -> None:
    """What a checkpoint's tokenizer and configuration say of the workload, before any rank has started."""
    if options.model == "tiny":
        return  # its byte tokenizer takes any prompt, and its context is checked by each rank
    from lockstep.runner.checkpoint_checks import check_config
    from lockstep.runner.ranks import load_tokenizer
    from lockstep.runner.run import check_requests, load_requests

    _quiet_transformers()
    config = check_config(options.model)
    tokenizer = load_tokenizer(options.model)
    requests = load_requests(options, tokenizer)
    check_requests(requests, options.model, config, tokenizer, options.seed, options.max_model_len)


def _dated_folder() -> Path:
    return Path("runs", time.strftime("%Y%m%d-%H%M%S"))


def _torchrun_id() -> str:
    """Name the run that this process is a rank of; the same after torchrun has started all ranks again."""
    if "RANK" not in os.environ:
        return ""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if run_id in ("", "none"):  # of a static rendezvous, whose address stays
        run_id = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    return "ranks of " + " ".join(run_id.split())


def _tiny(out: Path, rank: int, options: RunOptions) -> str:
    """Make the small model in the run's folder; each rank of torchrun makes its own: hosts need not share a disk."""
    from lockstep.models.tiny import make_tiny

    _quiet_transformers()
    return str(make_tiny(out / f"tiny-{rank}", seed=options.seed, num_experts=_TINY_EXPERTS))


def _check_checkpoint(options: RunOptions) -> None:
    """What can be said of a checkpoint before any rank has started, and a folder made."""
    from lockstep.runner.checkpoint_checks import check_checkpoint

    if options.model != "tiny":
        check_checkpoint(options.model, options.world_size)
    elif _TINY_EXPERTS % options.world_size:
        raise ConfigurationError(f"{_TINY_EXPERTS} experts cannot be divided over {options.world_size} ranks")


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _finish(command: RunCommand, options: RunOptions, result: dict[str, Any], console: Console) -> int:
    from lockstep.report.html import write_report
    from lockstep.report.perfetto import write_trace
    from lockstep.report.tables import print_run
    from lockstep.runner.verify import Verification, verify

    out = Path(options.out)
    options = replace(options, dtype=result["engine"]["dtype"])
    records = read_step_log(out / "steps.jsonl").records
    verification = Verification(None)
    if command.verify:
        with progress(console, "comparing with one process", None) as show:
            verification = verify(options, show)
    summary = _summary(options, result, records, verification)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    outputs = [json.loads(line) for line in (out / "outputs.jsonl").read_text(encoding="utf-8").splitlines()]
    report = out / "report.html"
    write_trace(out / "trace.json", records)
    write_report(report, summary, records, outputs, command=shlex.join(["lockstep", *command.arguments]))
    if command.as_json:
        sys.stdout.write(json.dumps(summary) + "\n")
    else:
        print_run(summary, records, report)
    if verification.mismatches:
        console.print(f"outputs differ from one process: {verification.first}", style="red")
        return 1
    return 0


def _summary(
    options: RunOptions, result: dict[str, Any], records: list[StepLogRecord], verification: "Verification"
) -> dict[str, Any]:
    from lockstep.steplog.table import StepTable, loss_figures

    totals = summarize(records)
    loss = loss_figures(StepTable.from_records(records).lost_by_cause())
    wall_s, engine = result["wall_s"], result["engine"]
    # Each rank of a tensor-parallel group repeats these.
    repeated = ("prefill_tokens", "decode_tokens", "preempted", "overrun_rows", "cached_tokens")
    return {
        "requests": result["requests"],
        **{name: totals[name] for name in ("ranks", "steps", "real_tokens", "dummy_rows", "padding_rows")},
        **{name: totals[name] // options.tensor_parallel_size for name in repeated},
        **loss,
        "tokens_per_s": round(result["generated_tokens"] / wall_s, 3),
        "verified": verification.verified,
        "mismatches": verification.mismatches if verification.verified is not None else None,
        "compared_tokens": verification.compared_tokens,
        "outside_tolerance": verification.outside_tolerance,
        "generated_tokens": result["generated_tokens"],
        "wall_s": round(wall_s, 3),
        **{name: getattr(options, name) for name in _OPTIONS},
        **{name: engine[name] for name in _CHOSEN},
        # As the run had it, so that a simulation of the same requests has it too.
        "scheduler": asdict(options.scheduler)
        | {name: engine[name] for name in ("kv_capacity_tokens", "enable_prefix_caching")},
    }


def _say_how_far(how: str, out: Path, console: Console, seconds: float) -> None:
    try:
        finished = sum(len(part.read_bytes().splitlines()) for part in (out / PARTS).glob("outputs-rank*.jsonl"))
    except (OSError, LockstepError):
        finished = 0
    told = f"{how} after {seconds:.1f} s: {finished} requests were finished; their outputs are in {out / PARTS}"
    console.print(told, soft_wrap=True)
