"""The command `lockstep`. Each command imports what it needs when it runs, so that help is instant.

Exit status: 0 done (and, where outputs were compared, all equal); 1 the run failed or outputs differ; 2 bad input;
130 interrupted, 143 terminated (what was written is kept).
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="lockstep",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mixture-of-Experts models over ranks with uneven work: run, plan, simulate, see.",
)


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
    data_parallel_size: Annotated[int, typer.Option(help="Ranks with requests of their own.")] = 2,
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks that share one data-parallel rank's requests.")] = 1,
    max_chunk_size: Annotated[
        int | None, typer.Option(help="Most rows that one rank sends through an MoE layer at a time.")
    ] = None,
    dispatcher: Annotated[str, typer.Option(help="How tokens reach their experts.")] = "allgather",
    requests: Annotated[int | None, typer.Option(help="Only the first so many requests.")] = None,
    rate_scale: Annotated[float, typer.Option(help="Arrivals come this many times as fast.")] = 1.0,
    length_scale: Annotated[
        float | None, typer.Option(help="Multiplies the lengths of a trace; 1, or 0.05 where the model is `tiny`.")
    ] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Longer prompts are cut.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longer outputs are cut.")] = None,
    load_balancing: Annotated[str, typer.Option(help="round-robin, least-tokens or least-kv-cache.")] = "round-robin",
    max_num_batched_tokens: Annotated[int, typer.Option(help="Most tokens of one rank in one step.")] = 2048,
    max_num_seqs: Annotated[int, typer.Option(help="Most requests that one rank works on at a time.")] = 256,
    kv_capacity_tokens: Annotated[
        int | None, typer.Option(help="Tokens of KV cache that one rank has; requests that do not fit wait.")
    ] = None,
    max_prefill_delay_steps: Annotated[
        int, typer.Option(help="A prompt may wait so many steps for prompts of other ranks.")
    ] = 0,
    seconds_per_step: Annotated[float, typer.Option(help="Seconds of the workload's time that pass per step.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of made-up weights, prompts and workloads.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU where there is one.")] = None,
    deadline: Annotated[float, typer.Option(help="Longest wait for any rank, in seconds.")] = 30.0,
    max_restarts: Annotated[
        int,
        typer.Option(min=0, help="How often ranks that died or hang are started again; finished requests are kept."),
    ] = 3,
    verify: Annotated[bool, typer.Option(help="Compare with one process that holds all experts.")] = True,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve Prometheus text on this port of the loopback address.")
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
    from lockstep.report.run_command import RunCommand, execute
    from lockstep.runner.run import RunOptions
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
        deadline_s=deadline,
        workload_options=WorkloadOptions(
            rate_scale=rate_scale,
            length_scale=length_scale,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            num_requests=requests,
        ),
        scheduler=SchedulerConfig(
            load_balancing=load_balancing,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_prefill_delay_steps=max_prefill_delay_steps,
            kv_capacity_tokens=kv_capacity_tokens,
            seconds_per_step=seconds_per_step,
        ),
        keep_logits=verify and dtype != "float32",
        metrics_port=metrics_port,
    )
    raise typer.Exit(execute(RunCommand(options, verify, overwrite, as_json, sys.argv[1:], max_restarts)))


@app.command()
def plan(
    tokens: Annotated[str, typer.Option(help="Tokens of each data-parallel rank, such as 500,200,256.")],
    max_chunk_size: Annotated[
        int | None, typer.Option(help="Most rows that one rank brings per chunk; without it, one chunk.")
    ] = None,
    sp: Annotated[int, typer.Option(help="Ranks that share the tokens of one data-parallel rank.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Show the sizes and the chunks of one step, without running it."""
    from lockstep.errors import ConfigurationError, TokenCountError
    from lockstep.report.plan import parse_tokens, plan_document, print_plan

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
        str | None, typer.Option(help="Parameters of a synthetic workload: rate=5.5,burstiness=1.1,...")
    ] = None,
    data_parallel_size: Annotated[str, typer.Option(help="Ranks; several values with commas, as below.")] = "8",
    load_balancing: Annotated[str, typer.Option(help="round-robin, least-tokens, least-kv-cache.")] = "round-robin",
    max_prefill_delay_steps: Annotated[
        str, typer.Option(help="Most steps that a prompt waits for prompts of other ranks.")
    ] = "0",
    max_num_batched_tokens: Annotated[str, typer.Option(help="Most tokens of one rank in one step.")] = "2048",
    max_chunk_size: Annotated[
        str, typer.Option(help="Most rows that one rank sends through an MoE layer at a time, or `none`.")
    ] = "none",
    row_shapes: Annotated[
        str, typer.Option(help="ragged; dummy: one row where a rank has none; equal: all padded to the longest.")
    ] = "ragged",
    max_num_seqs: Annotated[int, typer.Option(help="Most requests that one rank works on at a time.")] = 256,
    kv_capacity_tokens: Annotated[
        int | None, typer.Option(help="Tokens of KV cache of one rank; requests that do not fit wait.")
    ] = None,
    buffer_capacity_rows: Annotated[
        int | None,
        typer.Option(help="Rows of all ranks that a rank's exchange buffers hold; larger chunks are cut smaller."),
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Only the first so many requests.")] = None,
    rate_scale: Annotated[float, typer.Option(help="Arrivals come this many times as fast.")] = 1.0,
    length_scale: Annotated[float, typer.Option(help="Multiplies the lengths.")] = 1.0,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Longer prompts are cut.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longer outputs are cut.")] = None,
    cost: Annotated[str, typer.Option(help="A shipped set of cost constants, or a JSON file.")] = "h200",
    ttft_p99: Annotated[
        str | None, typer.Option(help="Limit for the best setting: 99 % of first tokens within, such as 2s or 500ms.")
    ] = None,
    tpot_p99: Annotated[str | None, typer.Option(help="The same for the time per further token.")] = None,
    queue_p99: Annotated[str | None, typer.Option(help="The same for the wait in the queue.")] = None,
    seed: Annotated[int, typer.Option(help="Of a synthetic workload.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    validate: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a recorded run: compare its step times with the cost formula instead. Given several times "
            "for repeats of one run, the median time of each step counts."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report, tables, steps and trace.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier simulation in that folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Say what uneven ranks cost on a workload, and which setting gets it back, without running a model.

    Options that take several values with commas are combined, every value with every other.
    """
    from lockstep.report.simulate_command import SimulateCommand, execute, execute_validation, parse_list, parse_seconds
    from lockstep.simulation.cost import CostConstants
    from lockstep.simulation.simulator import SimulationConfig
    from lockstep.simulation.sweep import Grid
    from lockstep.workload import SchedulerConfig, SyntheticParameters, WorkloadOptions, load_workload

    constants = CostConstants.load(cost)
    if validate:
        raise typer.Exit(execute_validation(validate, constants, as_json))
    trace = load_workload(
        workload,
        WorkloadOptions(rate_scale, length_scale, max_prompt_tokens, max_new_tokens, requests),
        seed,
        SyntheticParameters.parse(synthetic) if synthetic else None,
    )
    command = SimulateCommand(
        trace,
        Grid(
            parse_list("data_parallel_size", data_parallel_size, int),
            parse_list("load_balancing", load_balancing, str),
            parse_list("max_prefill_delay_steps", max_prefill_delay_steps, int),
            parse_list("max_num_batched_tokens", max_num_batched_tokens, int),
            parse_list("max_chunk_size", max_chunk_size, lambda text: None if text == "none" else int(text)),
            parse_list("row_shapes", row_shapes, str),
        ),
        SimulationConfig(
            1,
            SchedulerConfig(max_num_seqs=max_num_seqs, kv_capacity_tokens=kv_capacity_tokens),
            constants,
            buffer_capacity_rows=buffer_capacity_rows,
        ),
        {
            "ttft_p99_s": parse_seconds("ttft_p99", ttft_p99),
            "tpot_p99_s": parse_seconds("tpot_p99", tpot_p99),
            "queue_p99_s": parse_seconds("queue_p99", queue_p99),
        },
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Put two runs side by side: figures, where the time went, and whether they did the same."""
    from lockstep.report.compare import compare_runs
    from lockstep.report.tables import print_comparison

    comparison = compare_runs(a, b)
    if as_json:
        typer.echo(json.dumps(comparison))
    else:
        print_comparison(comparison)


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
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
    rate_scale: Annotated[float, typer.Option(help="Arrivals come this many times as fast.")] = 1.0,
    length_scale: Annotated[float, typer.Option(help="Multiplies the lengths.")] = 1.0,
    requests: Annotated[int | None, typer.Option(help="Only the first so many requests.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Print a workload's rate, burstiness and lengths, and the synthetic parameters that resemble it."""
    from lockstep.report.tables import print_description
    from lockstep.workload import WorkloadOptions, load_workload
    from lockstep.workload.synthetic import describe as describe_requests

    trace = load_workload(file, WorkloadOptions(rate_scale, length_scale, num_requests=requests))
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
    data_parallel_size: Annotated[int, typer.Option(help="Ranks of those runs.", min=1)] = 2,
    requests: Annotated[int, typer.Option(help="Their requests.", min=1)] = 120,
    repeats: Annotated[int, typer.Option(help="How many times the same is run.", min=1)] = 3,
    out: Annotated[
        Path | None, typer.Option(help="File for the constants: cost.json; or, of --dispatch, this machine's place.")
    ] = None,
    dispatch: Annotated[
        bool, typer.Option("--dispatch", help="Instead, measure the backends and store by what `auto` is to choose.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Fit the simulator's cost constants, or those by which a backend is chosen, to this machine."""
    if dispatch:
        if run_folders:
            raise typer.BadParameter("recorded runs do not say what a backend takes: --dispatch measures by itself")
        if data_parallel_size < 2:
            raise typer.BadParameter(f"--dispatch measures between ranks: 2 at least, got {data_parallel_size}")
        from lockstep.report.calibrate_dispatch import execute_dispatch_calibration

        raise typer.Exit(execute_dispatch_calibration(data_parallel_size, out, as_json))
    from lockstep.report.calibrate import execute_calibration

    out = out or Path("cost.json")
    raise typer.Exit(execute_calibration(run_folders or [], model, data_parallel_size, requests, repeats, out, as_json))


@app.command()
def postmortem(
    files: Annotated[list[Path], typer.Argument(help="Flight recorders of the ranks of one run.")],
    stacks: Annotated[bool, typer.Option(help="Also print where each thread of each rank stood.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False,
) -> None:
    """Merge the ranks' flight recorders and show where they parted."""
    from lockstep.report.postmortem import postmortem_document, print_postmortem, read_recorder

    document = postmortem_document([read_recorder(path) for path in files])
    if as_json:
        typer.echo(json.dumps(document))
        return
    print_postmortem(document)
    if stacks:
        for rank, threads in document["stacks"].items():
            for name, lines in threads.items():
                typer.echo(f"\nrank {rank}, thread {name}:\n{''.join(lines)}")


def main() -> None:
    """Run the command line. Bad input becomes one sentence and exit status 2, any other error of ours 1."""
    from lockstep.errors import ConfigurationError, LockstepError

    try:
        app()
    except (ConfigurationError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError) as error:
        says = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            says = f"{error.filename}: {error.strerror}"
        typer.echo(f"lockstep: error: {says}", err=True)
        sys.exit(2)
    except (LockstepError, OSError) as error:  # a disk that is full, say: what was written is kept
        typer.echo(f"lockstep: error: {type(error).__name__}: {error}", err=True)
        if "RANK" in os.environ:
            # A rank of torchrun's: its groups may be in any state, and an orderly end would wait for their peers.
            sys.stdout.flush()
            os._exit(1)
        sys.exit(1)


if __name__ == "__main__":
    main()
