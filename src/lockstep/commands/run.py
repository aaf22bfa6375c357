"""`lockstep run`: checks before a run, its progress, verification, table and report."""

import functools
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from lockstep.commands.folder import output_folder
from lockstep.coordination.environment import environment_number
from lockstep.errors import ConfigurationError
from lockstep.moe.placement import LOAD_FILE, ExpertLoad
from lockstep.report.metrics import RunMetrics
from lockstep.report.terminal import Terminal, progress
from lockstep.runner.clock import expected_duration
from lockstep.runner.options import PARTS, RunOptions, check_checkpoint, check_config, placement_of, refuse_survivors
from lockstep.steplog.files import read_step_log
from lockstep.steplog.record import StepLogRecord, summarize
from lockstep.workload import load_workload

if TYPE_CHECKING:
    from lockstep.runner.ranks import Member
    from lockstep.runner.run import Progress as RunProgress
    from lockstep.runner.verify import Verification

_TINY_EXPERTS = 16
_RANKS_PER_CORE = 16  # maximum on a host
_OPTIONS = ("clock", "model", "workload", "data_parallel_size", "tensor_parallel_size", "max_chunk_size", "seed", "out")
# The engine's choices for the run.
_CHOSEN = (
    *("dispatcher", "dispatcher_note", "dtype", "device", "attention_name", "layers", "graphs", "graphs_note"),
    *("max_model_len", "kv_capacity_tokens"),
)


def execute(
    options: RunOptions, *, verify: bool, overwrite: bool, as_json: bool, arguments: Sequence[str], max_restarts: int
) -> int:
    """Check, run, verify and write everything; return 0, or 1 if outputs differ. Ends the process if interrupted."""
    rank, under_torchrun = environment_number("RANK", 0, default=0), "RANK" in os.environ
    _log_as(rank)
    console = Terminal(stderr=True)
    _check(options, console)
    out = options.out or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    with output_folder(out, overwrite, _torchrun_id()) as folder, ExitStack() as stack:
        if not under_torchrun:  # torchrun also sends SIGTERM to ranks whose peer has failed: they stay silent
            with suppress(ValueError):  # only the main thread takes signals
                stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _terminated))
        options = replace(options, out=str(folder))
        if options.model == "tiny":
            from lockstep.models.tiny import make_tiny

            # Under torchrun each rank makes its own: hosts need not share a disk.
            _quiet_transformers()
            model = make_tiny(folder / f"tiny-{rank}", seed=options.seed, num_experts=_TINY_EXPERTS)
            options = replace(options, model=str(model))
            placement_of(options)
        started = time.perf_counter()
        try:
            if under_torchrun:
                result = run_one_rank(options)
            else:
                from lockstep.runner.launcher import launch

                console.print(f"starting {options.world_size} ranks on this host", style="dim")
                result = launch(
                    options.world_size, run_one_rank, options,
                    max_restarts=max_restarts, deadline_s=options.deadline_s, survivors=options,
                )  # fmt: skip
            command = shlex.join(["lockstep", *arguments])
            return 0 if rank else _finish(options, result, console, verify, as_json, command)
        except KeyboardInterrupt as interrupt:
            terminated = isinstance(interrupt, _Terminated)
            _say_how_far("terminated" if terminated else "interrupted", folder, console, time.perf_counter() - started)
            sys.stderr.flush()
            os._exit(143 if terminated else 130)  # everything is written, and unloading torch takes most of a second


class _Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, except for the wording and the exit status."""


def _terminated(*_: object) -> NoReturn:
    raise _Terminated


def _log_as(rank: int) -> None:
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: %(levelname)s %(name)s: %(message)s")


def run_one_rank(options: RunOptions, member: "Member | None" = None) -> dict[str, Any]:
    """Run one rank in its process; the first remaining rank shows the progress of all on stderr."""
    rank = int(os.environ.get("RANK", "0"))
    _log_as(rank)
    _quiet_transformers()
    from lockstep.runner import run as runner
    from lockstep.runner.ranks import describe

    console = Terminal(stderr=True)
    with ExitStack() as stack:

        @functools.cache  # a rank may become the first one during a run
        def display() -> tuple[Callable[..., None], RunMetrics | None]:
            metrics = None
            if options.metrics_port is not None:
                metrics = stack.enter_context(RunMetrics(options.metrics_port))
                console.print(f"metrics: http://127.0.0.1:{metrics.port}/metrics", style="dim")
            return stack.enter_context(progress(console, "running", None)), metrics

        def observe(seen: "RunProgress") -> None:
            show, metrics = display()
            if metrics is not None:
                metrics.observe(seen.num_tokens_across_dp, seen.agreement_s)
            rows = " ".join(f"{count:>4}" for count in seen.num_tokens_across_dp[:16])
            show(seen.rows_done, seen.rows_total, f"step {seen.step}, rows {rows}")

        def say(about: dict[str, Any]) -> None:
            display()
            num_ranks = options.world_size if member is None else len(member.members)
            console.print(describe(about, num_ranks), style="dim", soft_wrap=True)

        if rank == 0 and (member is None or not member.returns):
            display()[0](0, now="loading the model")
        return runner.run_rank(options, observe, say, member)


def _check(options: RunOptions, console: Console) -> None:
    """Report impossible options before starting ranks or creating a folder, cheapest checks first."""
    tiny = options.model == "tiny"
    if "RANK" in os.environ:
        refuse_survivors(survive=options.survive, restart_ranks=options.restart_ranks)
        if (started := environment_number("WORLD_SIZE", 0, default=0)) != options.world_size:
            wanted = f"data_parallel_size * tensor_parallel_size is {options.world_size}"
            raise ConfigurationError(f"torchrun started {started} ranks, but {wanted}")
    elif options.world_size > (most_ranks := _RANKS_PER_CORE * (os.cpu_count() or 1)):
        limit = f"at most {most_ranks} are started on its {os.cpu_count()} cores: use torchrun on several hosts"
        raise ConfigurationError(f"{options.world_size} ranks on this host, but {limit}")
    if options.expert_load and options.world_size == 1:
        raise ConfigurationError("expert_load needs ranks that share the experts, and data_parallel_size is 1")
    if options.workload != "synthetic" and (not os.path.exists(options.workload) or os.path.isdir(options.workload)):
        raise ConfigurationError(f"no workload at {options.workload}: there is no such file")
    trace = load_workload(options.workload, options.workload_options, options.seed)
    options.scheduler.check_fits(trace.requests)
    if os.environ.get("RANK", "0") == "0":
        if options.clock == "wall":
            console.print(expected_duration(trace.requests), style="dim", soft_wrap=True)
        if options.metrics_port is not None:
            RunMetrics(options.metrics_port).close()
        if trace.left_out:
            console.print(trace.left_out, style="yellow", soft_wrap=True)
    if not tiny:
        check_checkpoint(options.model)
    if not tiny or options.placement is None:
        placement_of(options)
    from lockstep.coordination.groups import own_device
    from lockstep.dispatch.choose import check_dispatcher

    own_device(options.device)
    check_dispatcher(options.dispatcher, device_type=own_device(None).type)
    if not tiny:  # the tiny model's tokenizer takes any prompt, and each rank checks its context
        from lockstep.runner.ranks import load_tokenizer
        from lockstep.runner.run import check_requests, load_requests

        _quiet_transformers()
        config = check_config(options.model)
        tokenizer = load_tokenizer(options.model)
        requests = load_requests(options, tokenizer)
        check_requests(requests, options.model, config, tokenizer, options.seed, options.max_model_len)


def _torchrun_id() -> str:
    """Return a name of this process's run that stays the same when torchrun restarts all ranks."""
    if "RANK" not in os.environ:
        return ""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if run_id in ("", "none"):  # a static rendezvous: its address does not change
        run_id = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    return "ranks of " + " ".join(run_id.split())


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _finish(
    options: RunOptions, result: dict[str, Any], console: Console, compare: bool, as_json: bool, command: str
) -> int:
    from lockstep.report.html import write_report
    from lockstep.report.perfetto import write_trace
    from lockstep.report.tables import print_run
    from lockstep.runner.verify import Verification, verify

    out = Path(options.out)
    options = replace(options, dtype=result["engine"]["dtype"])
    records = read_step_log(out / "steps.jsonl")
    verification = Verification(None)
    if compare:
        with progress(console, "comparing with one process", None) as show:
            verification = verify(options, show)
    summary = _summary(options, result, records, verification)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    outputs = [json.loads(line) for line in (out / "outputs.jsonl").read_text(encoding="utf-8").splitlines()]
    write_trace(out / "trace.json", records)
    load = ExpertLoad.read(out) if options.expert_load and (out / LOAD_FILE).exists() else None
    write_report(out / "report.html", summary, records, outputs, expert_load=load, command=command)
    if as_json:
        sys.stdout.write(json.dumps(summary) + "\n")
    else:
        print_run(summary, records, out / "report.html")
    if verification.mismatches:
        console.print(f"outputs differ from one process: {verification.first}", style="red")
        return 1
    return 0


def _summary(
    options: RunOptions, result: dict[str, Any], records: list[StepLogRecord], verification: "Verification"
) -> dict[str, Any]:
    from lockstep.steplog.table import StepTable, loss_figures

    totals = summarize(records)
    wall_s, engine = result["wall_s"], result["engine"]
    # The same on every rank of a tensor-parallel group.
    repeated = ("prefill_tokens", "decode_tokens", "preempted", "overrun_rows", "cached_tokens")
    return {
        "requests": result["requests"],
        **{name: totals[name] for name in ("ranks", "steps", "real_tokens", "dummy_rows", "padding_rows")},
        **{name: totals[name] // options.tensor_parallel_size for name in repeated},
        **loss_figures(StepTable.from_records(records).lost_by_cause()),
        "tokens_per_s": round(result["generated_tokens"] / wall_s, 3),
        "verified": verification.verified,
        "mismatches": verification.mismatches if verification.verified is not None else None,
        "compared_tokens": verification.compared_tokens,
        "outside_tolerance": verification.outside_tolerance,
        "generated_tokens": result["generated_tokens"],
        "wall_s": round(wall_s, 3),
        **{name: getattr(options, name) for name in _OPTIONS},
        **{name: engine[name] for name in _CHOSEN},
        # The run's value, so that a simulation of the same requests uses it too.
        "scheduler": asdict(options.scheduler)
        | {name: engine[name] for name in ("kv_capacity_tokens", "enable_prefix_caching")},
    }


def _say_how_far(how: str, out: Path, console: Console, seconds: float) -> None:
    finished = 0
    with suppress(OSError):
        finished = sum(len(part.read_bytes().splitlines()) for part in (out / PARTS).glob("outputs-rank*.jsonl"))
    told = f"{how} after {seconds:.1f} s: {finished} requests were finished; their outputs are in {out / PARTS}"
    console.print(told, soft_wrap=True)
