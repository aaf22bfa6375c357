"""The command `lockstep`. Each command imports what it needs when it runs, so that help is instant.

Exit status: 0 done (and, where outputs were compared, all equal); 1 the run failed, outputs differ, or no setting meets
the limits; 2 bad input; 130 interrupted, 143 terminated (what was written is kept).
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lockstep import cli_types as opt
from lockstep.cli_errors import run_to_status
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


@app.command()
def run(
    model: opt.Model = "tiny",
    workload: opt.Workload = "synthetic",
    data_parallel_size: opt.DataParallelSize = 2,
    tensor_parallel_size: opt.TensorParallelSize = 1,
    max_chunk_size: opt.MaxChunkSize = None,
    dispatcher: opt.DispatcherName = "auto",
    num_requests: opt.NumRequests = None,
    rate_scale: opt.RateScale = 1.0,
    length_scale: Annotated[
        float | None, opt.scale("Multiply the lengths of a trace by this factor; by default 1, or 0.05 for `tiny`.")
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
    enable_prefix_caching: opt.PrefixCaching = True,
    max_prefill_delay_steps: opt.MaxPrefillDelaySteps = 0,
    seconds_per_step: Annotated[float, opt.scale("Workload time that passes per step, in seconds.")] = 0.05,
    clock: Annotated[
        opt.Clock,
        opt.option("When requests arrive: by step number (repeats exactly), or in real time."),
    ] = "steps",
    seed: Annotated[int, opt.seed_of("Seed of random weights, prompts and workloads.")] = 0,
    dtype: opt.WeightsDType = "auto",
    quantize_experts: opt.QuantizeExperts = "auto",
    device: opt.Device = None,
    deadline_s: opt.Deadline = 30.0,
    survive: opt.Survive = 0,
    restart_ranks: opt.RestartRanks = 0,
    placement: opt.ExpertPlacement = None,
    num_redundant_experts: opt.NumRedundantExperts = 0,
    expert_load: Annotated[
        bool, opt.option("Count rows per expert, for expert_load.json and a heat map in the report.", "--expert-load")
    ] = False,
    max_restarts: Annotated[
        int,
        opt.steps(
            "Restart all ranks at most N times, when the remaining ranks cannot go on; finished requests are kept. "
            "No effect under torchrun, which has its own option."
        ),
    ] = 3,
    verify: Annotated[bool, opt.option("Compare all outputs with those of one process that holds all experts.")] = True,
    metrics_port: Annotated[
        int | None, opt.port("Serve Prometheus metrics on this port of the loopback address.")
    ] = None,
    out: Annotated[Path | None, opt.option("Output folder; by default runs/<date>-<time>.")] = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Run a model over several ranks with uneven work, check every token, and write a report.

    Starts the ranks on this host, or is one of them under torchrun.
    """
    given = locals()
    require("numpy", "transformers", "safetensors", *(["prometheus_client"] if metrics_port is not None else []))
    from lockstep.commands.run import execute
    from lockstep.runner.options import RunOptions
    from lockstep.workload import WorkloadOptions

    given |= {"out": str(out or ""), "keep_logprobs": verify}
    given["length_scale"] = length_scale or (0.05 if model == "tiny" else 1.0)
    given["workload_options"] = opt.fill(WorkloadOptions, given)
    raise typer.Exit(opt.fill(execute, given, options=opt.fill(RunOptions, given), arguments=sys.argv[1:]))


@app.command()
def serve(
    model: opt.Model = "tiny",
    served_model_name: Annotated[
        str | None, opt.option("Model name in requests; by default the value of --model.")
    ] = None,
    data_parallel_size: opt.DataParallelSize = 2,
    tensor_parallel_size: opt.TensorParallelSize = 1,
    max_chunk_size: opt.MaxChunkSize = None,
    dispatcher: opt.DispatcherName = "auto",
    load_balancing: opt.Balancing = "least-tokens",
    max_num_batched_tokens: opt.MaxNumBatchedTokens = 2048,
    max_num_seqs: opt.MaxNumSeqs = 256,
    kv_capacity_tokens: opt.KvCapacityTokens = None,
    max_model_len: opt.MaxModelLen = None,
    gpu_memory_utilization: opt.GpuMemoryUtilization = 0.9,
    enable_prefix_caching: opt.PrefixCaching = True,
    max_prefill_delay_steps: opt.MaxPrefillDelaySteps = 0,
    dtype: opt.WeightsDType = "auto",
    quantize_experts: opt.QuantizeExperts = "auto",
    device: opt.Device = None,
    deadline_s: opt.Deadline = 30.0,
    placement: opt.ExpertPlacement = None,
    num_redundant_experts: opt.NumRedundantExperts = 0,
    survive: opt.Survive = 0,
    restart_ranks: opt.RestartRanks = 0,
    start_timeout_s: Annotated[
        float, opt.scale("Longest wait until the ranks are ready, in seconds.", "--start-timeout")
    ] = 600.0,
    max_restarts: Annotated[
        int,
        opt.steps(
            "Restart all ranks at most N times without a finished request in between, when the remaining ranks cannot "
            "go on. Also the limit of restarts in a row of an API process."
        ),
    ] = 3,
    host: Annotated[str, opt.option("Address to listen on; by default only this host can connect.")] = "127.0.0.1",
    port: Annotated[int, opt.port("Port to listen on; 0 for any.")] = 8000,
    api_key: Annotated[
        str | None,
        opt.option("Key required for /v1. Visible in the process list: prefer $LOCKSTEP_API_KEY or --api-key-file."),
    ] = None,
    api_key_file: Annotated[Path | None, opt.option("File whose first line is the key required for /v1.")] = None,
    chat_template: Annotated[
        Path | None, opt.option("Jinja file to use instead of the tokenizer's chat template.")
    ] = None,
    api_processes: Annotated[
        int, opt.option("HTTP processes; with 1, the launcher itself.", parser=opt.whole(1, 64), metavar="N")
    ] = 1,
    max_queue: Annotated[int, opt.count("Maximum sequences waiting for a first token; more get status 429.")] = 1024,
    max_connections: Annotated[int, opt.count("Maximum open connections.")] = 4096,
    max_body_bytes: Annotated[int, opt.count("Maximum size of a request's body, in bytes.")] = 8 * 2**20,
    read_timeout_s: Annotated[
        float,
        opt.scale("Timeout for a request's head, in seconds; its body gets three times as long.", "--read-timeout"),
    ] = 10.0,
    drain_s: Annotated[float, opt.scale("Seconds that running requests get to finish after SIGTERM or Ctrl-C.")] = 30.0,
    log_requests: Annotated[opt.LogRequests, opt.option("What to log of each request.")] = "off",
) -> None:
    """Serve a model on ranks of this host, with OpenAI's completions and chats over HTTP."""
    given = locals()
    require(
        "starlette", "uvicorn", "httptools", "pydantic", "prometheus_client", "numpy", "transformers", "safetensors"
    )
    from lockstep.commands.serve import execute, read_api_key
    from lockstep.runner.options import EngineOptions
    from lockstep.serve.options import ServeOptions

    engine = opt.fill(EngineOptions, given)
    service = opt.fill(
        ServeOptions, given, model=served_model_name or model, api_key=read_api_key(api_key, api_key_file)
    )
    execute(engine, service, host, port, chat_template)


@app.command()
def plan(
    tokens: Annotated[str, opt.option("Token counts of the data-parallel ranks, such as 500,200,256.")],
    max_chunk_size_per_rank: Annotated[
        int | None, opt.count("Maximum rows per rank and chunk; by default, one chunk.", "--max-chunk-size")
    ] = None,
    sequence_parallel_size: Annotated[int, opt.count("Sequence-parallel ranks per data-parallel rank.", "--sp")] = 1,
    as_json: opt.AsJson = False,
) -> None:
    """Show the sizes and chunks of one step, without running it."""
    from lockstep.commands.plan import parse_tokens, plan_document, print_plan
    from lockstep.errors import ConfigurationError, TokenCountError

    try:
        document = plan_document(parse_tokens(tokens), sequence_parallel_size, max_chunk_size_per_rank)
    except TokenCountError as error:
        # A count that was typed is bad input, like any other option.
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
    load_balancing: Annotated[
        Any, opt.choices("How requests are assigned to ranks.", opt.LOAD_BALANCING)
    ] = "round-robin",
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
            "Extra rows: ragged: none; dummy: one on each rank without rows; equal: padding to the longest rank.",
            opt.ROW_SHAPES,
        ),
    ] = "ragged",
    max_num_seqs: opt.MaxNumSeqs = 256,
    kv_capacity_tokens: opt.KvCapacityTokens = None,
    enable_prefix_caching: opt.PrefixCaching = True,
    buffer_capacity_rows: Annotated[
        int | None,
        opt.count("Capacity of each rank's exchange buffers, in rows of all ranks together; larger chunks are split."),
    ] = None,
    num_requests: opt.NumRequests = None,
    rate_scale: opt.RateScale = 1.0,
    length_scale: opt.LengthScale = 1.0,
    max_prompt_tokens: opt.MaxPromptTokens = None,
    max_new_tokens: opt.MaxNewTokens = None,
    max_malformed_share: opt.MaxMalformedShare = 0.01,
    cost: Annotated[str, opt.option("Cost constants of a step: h100, cpu, linear, or a JSON file.")] = "h100",
    ttft_p99: Annotated[
        float | None, opt.limit("Limit for the 99th percentile of the time to the first token, such as 2s.")
    ] = None,
    tpot_p99: Annotated[float | None, opt.limit("Limit for the 99th percentile of the time per further token.")] = None,
    queue_p99: Annotated[float | None, opt.limit("Limit for the 99th percentile of the time in the queue.")] = None,
    seed: Annotated[int, opt.seed_of("Seed of a synthetic workload.")] = 0,
    placement: opt.ExpertPlacement = None,
    num_redundant_experts: opt.NumRedundantExperts = 0,
    workers: Annotated[int | None, opt.count("Worker processes; by default one per core.")] = None,
    validate: Annotated[
        list[Path] | None,
        opt.option(
            "Do not simulate: compare the step times of the recorded run in this folder with the cost formula. Give "
            "the option once for each repeat of the run; the median of each step counts."
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        opt.option(
            "Schedule the requests of the recorded run in this folder again, with the ends that it logged, and compare "
            "every step with what was executed. Exit status 1 if they differ."
        ),
    ] = None,
    out: Annotated[Path | None, opt.option("Folder for report, tables, steps and trace.")] = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Estimate what uneven ranks cost on a workload, and find the best setting, without running a model.

    Comma-separated values of several options are combined, each with each.
    """
    given = locals()
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
    trace = load_workload(workload, opt.fill(WorkloadOptions, given), seed, synthetic)
    grid = opt.fill(Grid, given)
    scheduler = SchedulerConfig(
        max_num_seqs=max_num_seqs, kv_capacity_tokens=kv_capacity_tokens, enable_prefix_caching=enable_prefix_caching
    )
    base = SimulationConfig(1, scheduler, constants, buffer_capacity_rows=buffer_capacity_rows)
    limits = {"ttft_p99_s": ttft_p99, "tpot_p99_s": tpot_p99, "queue_p99_s": queue_p99}
    gains = placement_gains(placement, data_parallel_size, num_redundant_experts) if placement else []
    given |= {"out": str(out or ""), "placement": gains, "arguments": sys.argv[1:]}
    raise typer.Exit(opt.fill(execute, given, trace=trace, grid=grid, base=base, limits=limits))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Folder of a run or a simulation.")],
    b: Annotated[Path, typer.Argument(help="Folder of the run or simulation to compare with it.")],
    as_json: opt.AsJson = False,
) -> None:
    """Compare two runs: figures, where the time went, and the first step in which they differ."""
    parquet = any((folder / name).is_file() for folder in (a, b) for name in ("steps.parquet", "requests.parquet"))
    require("numpy", *(["pyarrow"] if parquet else []))
    from lockstep.commands.compare import compare_runs
    from lockstep.report.tables import print_comparison

    comparison = compare_runs(a, b)
    typer.echo(json.dumps(comparison)) if as_json else print_comparison(comparison)


@app.command()
def env(as_json: opt.AsJson = False) -> None:
    """Describe this machine and try every backend between two local ranks. Exit status 1 if one fails."""
    from lockstep.runner.environment import all_work, describe, examine

    document = examine()
    typer.echo(json.dumps(document) if as_json else describe(document))
    raise typer.Exit(0 if all_work(document) else 1)


# With a callback, Typer keeps the name of a group's only command.
workload_app = typer.Typer(no_args_is_help=True, callback=lambda: None, help="Look at request traces.")
app.add_typer(workload_app, name="workload")


@workload_app.command()
def describe(
    file: Annotated[str, typer.Argument(help="Request trace, or `synthetic`.")],
    rate_scale: opt.RateScale = 1.0,
    length_scale: opt.LengthScale = 1.0,
    num_requests: opt.NumRequests = None,
    max_malformed_share: opt.MaxMalformedShare = 0.01,
    as_json: opt.AsJson = False,
) -> None:
    """Print a workload's rate, burstiness and lengths, and the synthetic parameters that resemble it."""
    given = locals()
    from lockstep.report.tables import print_description
    from lockstep.workload import WorkloadOptions, load_workload
    from lockstep.workload.synthetic import describe as describe_requests

    trace = load_workload(file, opt.fill(WorkloadOptions, given))
    description = describe_requests(trace.requests)
    if as_json:
        malformed = {"num_malformed": trace.num_malformed, "malformed": trace.malformed}
        typer.echo(json.dumps({"source": trace.source, "format": trace.format, **malformed, **description}))
    else:
        print_description(trace, description)


bench_app = typer.Typer(no_args_is_help=True, callback=lambda: None, help="Measure this machine.")
app.add_typer(bench_app, name="bench")


@bench_app.command()
def calibrate(
    run_folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of recorded runs; by default, new runs are made. Repeats count by their medians."),
    ] = None,
    model: Annotated[str, opt.option("Model of new runs: a checkpoint, or `tiny`.")] = "tiny",
    data_parallel_size: Annotated[int, opt.count("Ranks of new runs.")] = 2,
    requests: Annotated[int, opt.count("Requests of new runs.")] = 120,
    repeats: Annotated[int, opt.count("Number of new runs, repeats of each other.")] = 3,
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
            help="Flight recorder files of one run, or a folder of them. By default, the last failure in "
            "$LOCKSTEP_RECORDER_DIR or the system's temporary folder."
        ),
    ] = None,
    stacks: Annotated[bool, opt.option("Also print the stack of every thread.")] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Merge the flight recorders of all ranks and show the first step in which they differ."""
    from lockstep.commands.postmortem import postmortem_document, print_postmortem, read_recorders

    recorders, left_out = read_recorders(files or [])
    document = postmortem_document(recorders) | {"left_out": left_out}
    typer.echo(json.dumps(document)) if as_json else print_postmortem(document, stacks)


def main() -> None:
    """Run the command line; errors become one sentence and an exit status."""
    run_to_status(app)


if __name__ == "__main__":
    main()
