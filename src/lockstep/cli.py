"""The command `lockstep`. Each command imports what it needs when it runs, so that help is instant.

Exit status: 0 done (and, where outputs were compared, all equal); 1 the run failed or outputs differ; 2 bad input;
130 interrupted (what was written is kept).
"""

import json
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
    max_prefill_delay_steps: Annotated[
        int, typer.Option(help="A prompt may wait so many steps for prompts of other ranks.")
    ] = 0,
    seconds_per_step: Annotated[float, typer.Option(help="Seconds of the workload's time that pass per step.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of made-up weights, prompts and workloads.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU where there is one.")] = None,
    deadline: Annotated[float, typer.Option(help="Longest wait for any rank, in seconds.")] = 30.0,
    verify: Annotated[bool, typer.Option(help="Compare with one process that holds all experts.")] = True,
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
            seconds_per_step=seconds_per_step,
        ),
        keep_logits=verify and dtype != "float32",
    )
    raise typer.Exit(execute(RunCommand(options, verify, overwrite, as_json, sys.argv[1:])))


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


def main() -> None:
    """Run the command line; a `ConfigurationError` or unreadable path becomes one sentence and exit status 2."""
    from lockstep.errors import ConfigurationError, LockstepError

    try:
        app()
    except (ConfigurationError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        typer.echo(f"lockstep: error: {error}", err=True)
        sys.exit(2)
    except LockstepError as error:
        typer.echo(f"lockstep: error: {type(error).__name__}: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
