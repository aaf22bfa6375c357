"""The command `lockstep`. Each command imports what it needs when it runs, so that help is instant.

Exit status: 0 done (and, where outputs were compared, all equal); 1 the run failed, outputs differ, or no setting keeps
to the limits; 2 bad input; 130 interrupted, 143 terminated (what was written is kept).
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lockstep import cli_types as opt
from lockstep.cli_errors import run_to_status
from lockstep.cli_serve import serve
from lockstep.extras import require

app = typer.Typer(
    name="lockstep",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run, serve, plan and simulate Mixture-of-Experts models over ranks with uneven work.",
)


def _synthetic(text: str) -> Any:
    from lockstep.errors import ConfigurationError
    from lockstep.workload import SyntheticParameters

    try:
        return SyntheticParameters.parse(text)
    except ConfigurationError as error:
        raise typer.BadParameter(str(error)) from None


def _print_version(value: bool) -> None:
    if value:
        from lockstep._version import __version__

        typer.echo(f"lockstep {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


app.command()(serve)


@app.command()
def run(
    model: opt.Model = "tiny",
    workload: opt.Workload = "synthetic",
    data_parallel_size: opt.DataParallelSize = 2,
    tensor_parallel_size: opt.TensorParallelSize = 1,
    max_chunk_size: opt.MaxChunkSize = None,
    dispatcher: opt.DispatcherName = "auto",
    requests: opt.Requests = None,
    rate_scale: opt.RateScale = 1.0,
    length_scale: Annotated[
        float | None, opt.scale("Multiply the lengths of a trace; 1, or 0.05 where the model is `tiny`.")
    ] = None,
    max_prompt_tokens: opt.MaxPromptTokens = None,
    max_new_tokens: opt.MaxNewTokens = None,
    max_malformed_share: opt.MaxMalformedShare = 0.01,
    load_balancing: opt.Balancing = "round-robin",
    max_num_batched_tokens: opt.MaxNumBatchedTokens = 2048,
    max_num_seqs: opt.MaxNumSeqs = 256,
    kv_capacity_tokens: opt.KvCapacityTokens = None,
    max_model_len: opt.MaxModelLen = None,
    gpu_memory_utilization: opt.GpuMemoryUtilization = 0.9,
    prefix_caching: opt.PrefixCaching = True,
    max_prefill_delay_steps: opt.MaxPrefillDelaySteps = 0,
    seconds_per_step: Annotated[float, opt.scale("Workload time that passes per step, in seconds.")] = 0.05,
    clock: Annotated[
        opt.Clock,
        opt.option("When requests arrive: by step number (repeats exactly), or in real time."),
    ] = "steps",
    seed: Annotated[int, opt.seed_of("Seed of made-up weights, prompts and workloads.")] = 0,
    dtype: opt.WeightsDType = "auto",
    device: opt.Device = None,
    deadline: opt.Deadline = 30.0,
    survive: opt.Survive = 0,
    placement: opt.ExpertPlacement = None,
    num_redundant_experts: opt.NumRedundantExperts = 0,
    expert_load: Annotated[
        bool, opt.option("Count rows per expert: expert_load.json, and a heat map in the report.", "--expert-load")
    ] = False,
    max_restarts: Annotated[
        int, opt.steps("Maximum restarts of ranks that died or hang; finished requests are kept.")
    ] = 3,
    verify: Annotated[bool, opt.option("Compare with one process that holds all experts.")] = True,
    metrics_port: Annotated[
        int | None,
        opt.option(
            "Serve Prometheus metrics on this port of the loopback address.", parser=opt.whole(0, 65535), metavar="PORT"
        ),
    ] = None,
    out: Annotated[Path | None, opt.option("Output folder; by default runs/<date>-<time>.")] = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Run a model over several ranks with uneven work, check every token, and write a report.

    Starts the ranks on this host, or is one of them under torchrun.
    """
    require("numpy", "transformers", "safetensors", *(["prometheus_client"] if metrics_port is not None else []))
    from lockstep.commands.run import execute
    from lockstep.runner.options import RunOptions
    from lockstep.workload import SchedulerConfig, WorkloadOptions

    if length_scale is None:
        length_scale = 0.05 if model == "tiny" else 1.0
    options = RunOptions(
        model=model, workload=workload, out=str(out or ""), data_parallel_size=data_parallel_size,
        tensor_parallel_size=tensor_parallel_size, max_chunk_size=max_chunk_size, dispatcher=dispatcher, dtype=dtype,
        device=device, seed=seed, clock=clock, deadline_s=deadline, survive=survive, metrics_port=metrics_port,
        max_model_len=max_model_len, gpu_memory_utilization=gpu_memory_utilization, keep_logprobs=verify,
        placement=placement, num_redundant_experts=num_redundant_experts, expert_load=expert_load,
        workload_options=WorkloadOptions(
            rate_scale, length_scale, max_prompt_tokens, max_new_tokens, requests, max_malformed_share
        ),
        scheduler=SchedulerConfig(
            load_balancing, max_num_batched_tokens, max_num_seqs, max_prefill_delay_steps, kv_capacity_tokens,
            seconds_per_step, prefix_caching,
        ),
    )  # fmt: skip
    how: dict[str, Any] = {"verify": verify, "overwrite": overwrite, "as_json": as_json, "max_restarts": max_restarts}
    raise typer.Exit(execute(options, **how, arguments=sys.argv[1:]))


@app.command()
def plan(
    tokens: Annotated[str, opt.option("Tokens of each data-parallel rank, such as 500,200,256.")],
    max_chunk_size: Annotated[int | None, opt.count("Maximum rows per rank and chunk; without it, one chunk.")] = None,
    sp: Annotated[int, opt.count("Ranks that share the tokens of one data-parallel rank.")] = 1,
    as_json: opt.AsJson = False,
) -> None:
    """Show the sizes and the chunks of one step, without running it."""
    from lockstep.commands.plan import parse_tokens, plan_document, print_plan
    from lockstep.errors import ConfigurationError, TokenCountError

    try:
        document = plan_document(parse_tokens(tokens), sp, max_chunk_size)
    except TokenCountError as error:
        # Here a wrong count is what somebody typed, and so ends like any other bad option.
        raise ConfigurationError(str(error)) from None
    typer.echo(json.dumps(document)) if as_json else print_plan(document)


@app.command()
def simulate(
    workload: opt.Workload = "synthetic",
    synthetic: Annotated[
        Any,
        opt.option(
            "Parameters of a synthetic workload: rate=5.5,burstiness=1,...", parser=_synthetic, metavar="NAME=N,..."
        ),
    ] = None,
    data_parallel_size: Annotated[Any, opt.numbers("Number of ranks.", high=opt.MOST_RANKS)] = "8",
    load_balancing: Annotated[Any, opt.choices("Which rank gets a request.", opt.LOAD_BALANCING)] = "round-robin",
    max_prefill_delay_steps: Annotated[
        Any, opt.numbers("Maximum steps that a prompt waits for prompts of other ranks.", low=0)
    ] = "0",
    max_num_batched_tokens: Annotated[Any, opt.numbers("Maximum tokens per rank and step.")] = "2048",
    max_chunk_size: Annotated[
        Any, opt.numbers("Maximum rows per rank and MoE chunk, or `none`.", none="none")
    ] = "none",
    row_shapes: Annotated[
        Any,
        opt.choices(
            "Rows sent: ragged; dummy: one for a rank without rows; equal: padded to the longest.", opt.ROW_SHAPES
        ),
    ] = "ragged",
    max_num_seqs: opt.MaxNumSeqs = 256,
    kv_capacity_tokens: opt.KvCapacityTokens = None,
    prefix_caching: opt.PrefixCaching = True,
    buffer_capacity_rows: Annotated[
        int | None, opt.count("Rows of all ranks that a rank's exchange buffers hold; larger chunks are split.")
    ] = None,
    requests: opt.Requests = None,
    rate_scale: opt.RateScale = 1.0,
    length_scale: opt.LengthScale = 1.0,
    max_prompt_tokens: opt.MaxPromptTokens = None,
    max_new_tokens: opt.MaxNewTokens = None,
    max_malformed_share: opt.MaxMalformedShare = 0.01,
    cost: Annotated[str, opt.option("A shipped set of cost constants, or a JSON file.")] = "h100",
    ttft_p99: Annotated[
        float | None, opt.limit("Limit for the 99th percentile of the time to the first token, such as 2s.")
    ] = None,
    tpot_p99: Annotated[float | None, opt.limit("The same for the time per further token.")] = None,
    queue_p99: Annotated[float | None, opt.limit("The same for the time in the queue.")] = None,
    seed: Annotated[int, opt.seed_of("Seed of a synthetic workload.")] = 0,
    placement: opt.ExpertPlacement = None,
    num_redundant_experts: opt.NumRedundantExperts = 0,
    workers: Annotated[int | None, opt.count("Processes; one per core by default.")] = None,
    validate: Annotated[
        list[Path] | None,
        opt.option(
            "Folder of a recorded run: compare its step times with the cost formula instead. Repeat the option for "
            "repeats of one run; the median of each step counts."
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        opt.option(
            "Folder of a recorded run: plan its requests again, with the logged ends, and compare every step with "
            "what was executed. Exit status 1 if they differ."
        ),
    ] = None,
    out: Annotated[Path | None, opt.option("Folder for report, tables, steps and trace.")] = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Estimate what uneven ranks cost on a workload, and find the best setting, without running a model.

    Options with several values, separated by commas, are combined, every value with every other.
    """
    require("numpy", *(["pyarrow"] if out else []))
    from lockstep.commands.simulate import execute, execute_replay, execute_validation, placement_gains
    from lockstep.simulation.config import SimulationConfig
    from lockstep.simulation.cost import CostConstants
    from lockstep.simulation.sweep import Grid
    from lockstep.workload import SchedulerConfig, WorkloadOptions, load_workload

    constants = CostConstants.load(cost)
    if validate:
        raise typer.Exit(execute_validation(validate, constants, as_json))
    if replay:
        raise typer.Exit(execute_replay(replay, constants, as_json))
    options = WorkloadOptions(
        rate_scale, length_scale, max_prompt_tokens, max_new_tokens, requests, max_malformed_share
    )
    trace = load_workload(workload, options, seed, synthetic)
    grid = Grid(
        data_parallel_size, load_balancing, max_prefill_delay_steps, max_num_batched_tokens, max_chunk_size, row_shapes
    )
    scheduler = SchedulerConfig(
        max_num_seqs=max_num_seqs, kv_capacity_tokens=kv_capacity_tokens, enable_prefix_caching=prefix_caching
    )
    base = SimulationConfig(1, scheduler, constants, buffer_capacity_rows=buffer_capacity_rows)
    limits = {"ttft_p99_s": ttft_p99, "tpot_p99_s": tpot_p99, "queue_p99_s": queue_p99}
    how: dict[str, Any] = {"out": str(out or ""), "overwrite": overwrite, "as_json": as_json, "workers": workers}
    if placement:
        how["placement"] = placement_gains(placement, data_parallel_size, num_redundant_experts)
    raise typer.Exit(execute(trace, grid, base, limits, **how, arguments=sys.argv[1:]))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Folder of a run or a simulation.")],
    b: Annotated[Path, typer.Argument(help="Folder of another run or simulation.")],
    as_json: opt.AsJson = False,
) -> None:
    """Put two runs side by side: figures, where the time went, and whether they did the same."""
    parquet = any((folder / name).is_file() for folder in (a, b) for name in ("steps.parquet", "requests.parquet"))
    require("numpy", *(["pyarrow"] if parquet else []))
    from lockstep.commands.compare import compare_runs
    from lockstep.report.tables import print_comparison

    comparison = compare_runs(a, b)
    typer.echo(json.dumps(comparison)) if as_json else print_comparison(comparison)


@app.command()
def env(as_json: opt.AsJson = False) -> None:
    """Show what this machine offers, and try every backend between two local ranks; exit status 1 if one fails."""
    from lockstep.runner.environment import all_work, describe, examine

    document = examine()
    typer.echo(json.dumps(document) if as_json else describe(document))
    raise typer.Exit(0 if all_work(document) else 1)


workload_app = typer.Typer(no_args_is_help=True, help="Look at request traces.")
app.add_typer(workload_app, name="workload")


@workload_app.callback()
def _workload_options() -> None:
    """Keep `describe` a command of its own name, although it is the only one."""


@workload_app.command()
def describe(
    file: Annotated[str, typer.Argument(help="Request trace, or `synthetic`.")],
    rate_scale: opt.RateScale = 1.0,
    length_scale: opt.LengthScale = 1.0,
    requests: opt.Requests = None,
    max_malformed_share: opt.MaxMalformedShare = 0.01,
    as_json: opt.AsJson = False,
) -> None:
    """Print a workload's rate, burstiness and lengths, and the synthetic parameters that resemble it."""
    from lockstep.report.tables import print_description
    from lockstep.workload import WorkloadOptions, load_workload
    from lockstep.workload.synthetic import describe as describe_requests

    options = WorkloadOptions(rate_scale, length_scale, None, None, requests, max_malformed_share)
    trace = load_workload(file, options)
    description = describe_requests(trace.requests)
    if as_json:
        malformed = {"num_malformed": trace.num_malformed, "malformed": [str(line) for line in trace.malformed]}
        typer.echo(json.dumps({"source": trace.source, "format": trace.format, **malformed, **description}))
    else:
        print_description(trace, description)


bench_app = typer.Typer(no_args_is_help=True, help="Measure this machine.")
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def _bench_options() -> None:
    """Keep `calibrate` a command of its own name, although it is the only one."""


@bench_app.command()
def calibrate(
    run_folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of recorded runs; by default, runs are made. Of repeats, medians count."),
    ] = None,
    model: Annotated[str, opt.option("Model of those runs: a checkpoint, or `tiny`.")] = "tiny",
    data_parallel_size: Annotated[int, opt.count("Ranks of those runs.")] = 2,
    requests: Annotated[int, opt.count("Requests of those runs.")] = 120,
    repeats: Annotated[int, opt.count("Repeats of each run.")] = 3,
    out: Annotated[Path, opt.option("File for the constants.")] = Path("cost.json"),
    as_json: opt.AsJson = False,
) -> None:
    """Fit the simulator's cost constants to this machine."""
    require("numpy", *([] if run_folders else ["transformers", "safetensors"]))
    from lockstep.commands.calibrate import execute_calibration

    raise typer.Exit(execute_calibration(run_folders or [], model, data_parallel_size, requests, repeats, out, as_json))


@app.command()
def postmortem(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Recorder files of one run's ranks, or a folder of them. By default, the last failure in "
            "$LOCKSTEP_RECORDER_DIR or the system's temporary folder."
        ),
    ] = None,
    stacks: Annotated[bool, opt.option("Also print the stack of each thread.")] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Merge the ranks' flight recorders and show the first step in which they differ."""
    from lockstep.commands.postmortem import postmortem_document, print_postmortem, read_recorders

    recorders, num_left_out = read_recorders(files or [])
    document = postmortem_document(recorders)
    typer.echo(json.dumps(document)) if as_json else print_postmortem(document, num_left_out, stacks)


def main() -> None:
    """Run the command line. Bad input becomes one sentence and exit status 2, any other error of ours 1."""
    run_to_status(app)


if __name__ == "__main__":
    main()
