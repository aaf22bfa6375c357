"""The command `lockstep`. Each command imports what it needs when it runs, so that help is instant.

Exit status: 0 done (and, where outputs were compared, all equal); 1 the run failed, outputs differ, or no setting keeps
to the limits; 2 bad input; 130 interrupted, 143 terminated (what was written is kept).
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lockstep.cli_errors import run_to_status
from lockstep.cli_types import (
    COUNT,
    LOAD_BALANCING,
    MOST_RANKS,
    ROW_SHAPES,
    SCALE,
    SEED,
    SHARE,
    STEPS,
    TIME,
    AsJson,
    Clock,
    Dispatcher,
    DType,
    KvCapacityTokens,
    LoadBalancing,
    MaxMalformedShare,
    MaxNewTokens,
    MaxNumSeqs,
    MaxPromptTokens,
    RateScale,
    Requests,
    one_of,
    several,
    whole,
)
from lockstep.cli_types import device as device_name
from lockstep.extras import require

app = typer.Typer(
    name="lockstep",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mixture-of-Experts models over ranks with uneven work: run, plan, simulate, see.",
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
    model: Annotated[
        str, typer.Option(help="Checkpoint folder or Hub id, or `tiny`: a small model made on the spot.")
    ] = "tiny",
    workload: Annotated[
        str, typer.Option(help="Request trace (Azure CSV, Mooncake or prompts JSONL), or `synthetic`.")
    ] = "synthetic",
    data_parallel_size: Annotated[int, typer.Option(**COUNT, help="Ranks with requests of their own.")] = 2,
    tensor_parallel_size: Annotated[
        int, typer.Option(**COUNT, help="Ranks that share one data-parallel rank's requests.")
    ] = 1,
    max_chunk_size: Annotated[int | None, typer.Option(**COUNT, help="Maximum rows per rank and MoE chunk.")] = None,
    dispatcher: Annotated[Dispatcher, typer.Option(help="How tokens reach their experts.")] = "auto",
    requests: Requests = None,
    rate_scale: RateScale = 1.0,
    length_scale: Annotated[
        float | None,
        typer.Option(**SCALE, help="Multiply the lengths of a trace; 1, or 0.05 where the model is `tiny`."),
    ] = None,
    max_prompt_tokens: MaxPromptTokens = None,
    max_new_tokens: MaxNewTokens = None,
    max_malformed_share: MaxMalformedShare = 0.01,
    load_balancing: Annotated[LoadBalancing, typer.Option(help="Which rank gets a request.")] = "round-robin",
    max_num_batched_tokens: Annotated[int, typer.Option(**COUNT, help="Maximum tokens per rank and step.")] = 2048,
    max_num_seqs: MaxNumSeqs = 256,
    kv_capacity_tokens: KvCapacityTokens = None,
    max_model_len: Annotated[
        int | None, typer.Option(**COUNT, help="Maximum tokens per request; by default the model's context.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(**SHARE, help="Share of a GPU's memory for weights, KV cache and the rest together.")
    ] = 0.9,
    max_prefill_delay_steps: Annotated[
        int, typer.Option(**STEPS, help="Maximum steps that a prompt waits for prompts of other ranks.")
    ] = 0,
    seconds_per_step: Annotated[
        float, typer.Option(**SCALE, help="Seconds of the workload's time that pass per step.")
    ] = 0.05,
    clock: Annotated[
        Clock,
        typer.Option(help="When requests arrive: by the number of the step, which repeats exactly, or in real time."),
    ] = "steps",
    seed: Annotated[int, typer.Option(**SEED, help="Seed of made-up weights, prompts and workloads.")] = 0,
    dtype: Annotated[DType, typer.Option(help="Type of the weights; `auto`: the checkpoint's.")] = "auto",
    device: Annotated[
        str | None,
        typer.Option(
            parser=device_name,
            metavar="cpu|cuda|cuda:N",
            help="Where the model runs; by default on a GPU if there is one.",
        ),
    ] = None,
    deadline: Annotated[float, typer.Option(**SCALE, help="Longest wait for any rank, in seconds.")] = 30.0,
    max_restarts: Annotated[
        int,
        typer.Option(**STEPS, help="How often ranks that died or hang are started again; finished requests are kept."),
    ] = 3,
    verify: Annotated[bool, typer.Option(help="Compare with one process that holds all experts.")] = True,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            parser=whole(0, 65535), metavar="PORT", help="Serve Prometheus text on this port of the loopback address."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; runs/<date>-<time> by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in that folder.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout instead of the table.")
    ] = False,
) -> None:
    """Run a model over several ranks with uneven work, check every token, and write a report.

    Starts the ranks on this host, or is one of them under torchrun.
    """
    require("numpy", "transformers", "safetensors", *(["prometheus_client"] if metrics_port is not None else []))
    from lockstep.commands.run import RunCommand, execute
    from lockstep.runner.options import RunOptions
    from lockstep.workload import SchedulerConfig, WorkloadOptions

    if length_scale is None:
        length_scale = 0.05 if model == "tiny" else 1.0
    options = RunOptions(
        model=model,
        workload=workload,
        out=str(out) if out is not None else "",
        data_parallel_size=data_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
        max_chunk_size=max_chunk_size,
        dispatcher=dispatcher,
        dtype=dtype,
        device=device,
        seed=seed,
        clock=clock,
        deadline_s=deadline,
        workload_options=WorkloadOptions(
            rate_scale=rate_scale,
            length_scale=length_scale,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            num_requests=requests,
            max_malformed_share=max_malformed_share,
        ),
        scheduler=SchedulerConfig(
            load_balancing=load_balancing,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_prefill_delay_steps=max_prefill_delay_steps,
            kv_capacity_tokens=kv_capacity_tokens,
            seconds_per_step=seconds_per_step,
        ),
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        keep_logprobs=verify,
        metrics_port=metrics_port,
    )
    raise typer.Exit(execute(RunCommand(options, verify, overwrite, as_json, sys.argv[1:], max_restarts)))


@app.command()
def plan(
    tokens: Annotated[str, typer.Option(help="Tokens of each data-parallel rank, such as 500,200,256.")],
    max_chunk_size: Annotated[
        int | None, typer.Option(**COUNT, help="Maximum rows per rank and chunk; without it, one chunk.")
    ] = None,
    sp: Annotated[int, typer.Option(**COUNT, help="Ranks that share the tokens of one data-parallel rank.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show the sizes and the chunks of one step, without running it."""
    from lockstep.commands.plan import parse_tokens, plan_document, print_plan
    from lockstep.errors import ConfigurationError, TokenCountError

    try:
        document = plan_document(parse_tokens(tokens), sp, max_chunk_size)
    except TokenCountError as error:
        # Here a wrong count is what somebody typed, and so ends like any other bad option.
        raise ConfigurationError(str(error)) from None
    if as_json:
        typer.echo(json.dumps(document))
    else:
        print_plan(document)


@app.command()
def simulate(
    workload: Annotated[
        str, typer.Option(help="Request trace (Azure CSV, Mooncake or prompts JSONL; gzip too), or `synthetic`.")
    ] = "synthetic",
    synthetic: Annotated[
        Any,
        typer.Option(
            parser=_synthetic,
            metavar="NAME=N,...",
            help="Parameters of a synthetic workload: rate=5.5,burstiness=1,...",
        ),
    ] = None,
    data_parallel_size: Annotated[
        Any,
        typer.Option(
            parser=several(whole(1, MOST_RANKS)), metavar="N,...", help="Ranks; several values with commas, as below."
        ),
    ] = "8",
    load_balancing: Annotated[
        Any,
        typer.Option(
            parser=several(one_of(*LOAD_BALANCING)),
            metavar="|".join(LOAD_BALANCING),
            help="Which rank gets a request.",
        ),
    ] = "round-robin",
    max_prefill_delay_steps: Annotated[
        Any,
        typer.Option(
            parser=several(whole(0)),
            metavar="N,...",
            help="Maximum steps that a prompt waits for prompts of other ranks.",
        ),
    ] = "0",
    max_num_batched_tokens: Annotated[
        Any, typer.Option(parser=several(whole(1)), metavar="N,...", help="Maximum tokens per rank and step.")
    ] = "2048",
    max_chunk_size: Annotated[
        Any,
        typer.Option(
            parser=several(whole(1), none="none"),
            metavar="N|none,...",
            help="Maximum rows per rank and MoE chunk, or `none`.",
        ),
    ] = "none",
    row_shapes: Annotated[
        Any,
        typer.Option(
            parser=several(one_of(*ROW_SHAPES)),
            metavar="|".join(ROW_SHAPES),
            help="ragged; dummy: one row where a rank has none; equal: all padded to the longest.",
        ),
    ] = "ragged",
    max_num_seqs: MaxNumSeqs = 256,
    kv_capacity_tokens: KvCapacityTokens = None,
    buffer_capacity_rows: Annotated[
        int | None,
        typer.Option(
            **COUNT, help="Rows of all ranks that a rank's exchange buffers hold; larger chunks are cut smaller."
        ),
    ] = None,
    requests: Requests = None,
    rate_scale: RateScale = 1.0,
    length_scale: Annotated[float, typer.Option(**SCALE, help="Multiply the lengths by this factor.")] = 1.0,
    max_prompt_tokens: MaxPromptTokens = None,
    max_new_tokens: MaxNewTokens = None,
    max_malformed_share: MaxMalformedShare = 0.01,
    cost: Annotated[str, typer.Option(help="A shipped set of cost constants, or a JSON file.")] = "h200",
    ttft_p99: Annotated[
        float | None,
        typer.Option(**TIME, help="Limit for the best setting: 99 % of first tokens within, such as 2s or 500ms."),
    ] = None,
    tpot_p99: Annotated[
        float | None, typer.Option(**TIME, help="The same limit for the time per further token.")
    ] = None,
    queue_p99: Annotated[float | None, typer.Option(**TIME, help="The same limit for the wait in the queue.")] = None,
    seed: Annotated[int, typer.Option(**SEED, help="Seed of a synthetic workload.")] = 0,
    workers: Annotated[int | None, typer.Option(**COUNT, help="Processes; one per core by default.")] = None,
    validate: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a recorded run: compare its step times with the cost formula instead. Given several times "
            "for repeats of one run, the median time of each step counts."
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a recorded run: plan its requests again, with the ends that it logged, and compare every "
            "step with what was executed. Exit status 1 where they differ."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report, tables, steps and trace.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier simulation in that folder.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what uneven ranks cost on a workload, and which setting gets it back, without running a model.

    Options that take several values with commas are combined, every value with every other.
    """
    require("numpy", *(["pyarrow", "plotly"] if out else []))
    from lockstep.commands.simulate import SimulateCommand, execute, execute_replay, execute_validation
    from lockstep.simulation.cost import CostConstants
    from lockstep.simulation.simulator import SimulationConfig
    from lockstep.simulation.sweep import Grid
    from lockstep.workload import SchedulerConfig, WorkloadOptions, load_workload

    constants = CostConstants.load(cost)
    if validate:
        raise typer.Exit(execute_validation(validate, constants, as_json))
    if replay:
        raise typer.Exit(execute_replay(replay, constants, as_json))
    trace = load_workload(
        workload,
        WorkloadOptions(rate_scale, length_scale, max_prompt_tokens, max_new_tokens, requests, max_malformed_share),
        seed,
        synthetic,
    )
    command = SimulateCommand(
        trace,
        Grid(
            data_parallel_size,
            load_balancing,
            max_prefill_delay_steps,
            max_num_batched_tokens,
            max_chunk_size,
            row_shapes,
        ),
        SimulationConfig(
            1,
            SchedulerConfig(max_num_seqs=max_num_seqs, kv_capacity_tokens=kv_capacity_tokens),
            constants,
            buffer_capacity_rows=buffer_capacity_rows,
        ),
        {"ttft_p99_s": ttft_p99, "tpot_p99_s": tpot_p99, "queue_p99_s": queue_p99},
        str(out or ""),
        overwrite,
        as_json,
        workers,
        sys.argv[1:],
    )
    raise typer.Exit(execute(command))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Folder of a run or a simulation.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Put two runs side by side: figures, where the time went, and whether they did the same."""
    parquet = any((folder / name).is_file() for folder in (a, b) for name in ("steps.parquet", "requests.parquet"))
    require("numpy", *(["pyarrow"] if parquet else []))
    from lockstep.commands.compare import compare_runs
    from lockstep.report.tables import print_comparison

    comparison = compare_runs(a, b)
    if as_json:
        typer.echo(json.dumps(comparison))
    else:
        print_comparison(comparison)


@app.command()
def env(
    as_json: AsJson = False,
) -> None:
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
    rate_scale: RateScale = 1.0,
    length_scale: Annotated[float, typer.Option(**SCALE, help="Multiply the lengths by this factor.")] = 1.0,
    requests: Requests = None,
    max_malformed_share: MaxMalformedShare = 0.01,
    as_json: AsJson = False,
) -> None:
    """Print a workload's rate, burstiness and lengths, and the synthetic parameters that resemble it."""
    from lockstep.report.tables import print_description
    from lockstep.workload import WorkloadOptions, load_workload
    from lockstep.workload.synthetic import describe as describe_requests

    trace = load_workload(
        file,
        WorkloadOptions(rate_scale, length_scale, num_requests=requests, max_malformed_share=max_malformed_share),
    )
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
        typer.Argument(help="Recorded runs; without any, some are made. Of repeats, each step's median time counts."),
    ] = None,
    model: Annotated[str, typer.Option(help="What to run then: a checkpoint, or `tiny`.")] = "tiny",
    data_parallel_size: Annotated[int, typer.Option(**COUNT, help="Ranks of those runs.")] = 2,
    requests: Annotated[int, typer.Option(**COUNT, help="Requests of those runs.")] = 120,
    repeats: Annotated[int, typer.Option(**COUNT, help="How many times the same is run.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="File for the constants: cost.json; or, of --dispatch, this machine's place.")
    ] = None,
    dispatch: Annotated[
        bool, typer.Option("--dispatch", help="Instead, measure the backends and store by what `auto` is to choose.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fit the simulator's cost constants, or those by which a backend is chosen, to this machine."""
    if dispatch:
        if run_folders:
            raise typer.BadParameter("recorded runs do not say what a backend takes: --dispatch measures by itself")
        if data_parallel_size < 2:
            raise typer.BadParameter(
                f"--dispatch measures between ranks: --data-parallel-size must be >= 2, got {data_parallel_size}"
            )
        from lockstep.commands.calibrate_dispatch import execute_dispatch_calibration

        raise typer.Exit(execute_dispatch_calibration(data_parallel_size, out, as_json))
    require("numpy", *([] if run_folders else ["transformers", "safetensors"]))
    from lockstep.commands.calibrate import execute_calibration

    out = out or Path("cost.json")
    raise typer.Exit(execute_calibration(run_folders or [], model, data_parallel_size, requests, repeats, out, as_json))


@app.command()
def postmortem(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Flight recorders of the ranks of one run, or a folder that holds them. Without any: the folder into "
            "which ranks write, $LOCKSTEP_RECORDER_DIR or the system's temporary folder; its last failure counts."
        ),
    ] = None,
    stacks: Annotated[bool, typer.Option(help="Also print where each thread of each rank stood.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False,
) -> None:
    """Merge the ranks' flight recorders and show where they parted."""
    from lockstep.commands.postmortem import postmortem_document, print_postmortem, read_recorders

    recorders, num_left_out = read_recorders(files or [])
    document = postmortem_document(recorders)
    if as_json:
        typer.echo(json.dumps(document))
    else:
        print_postmortem(document, num_left_out, stacks)


def main() -> None:
    """Run the command line. Bad input becomes one sentence and exit status 2, any other error of ours 1."""
    run_to_status(app)


if __name__ == "__main__":
    main()
