"""The command `lockstep serve`: its options."""

from pathlib import Path
from typing import Annotated

from lockstep import cli_types as opt
from lockstep.extras import require


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
    prefix_caching: opt.PrefixCaching = True,
    max_prefill_delay_steps: opt.MaxPrefillDelaySteps = 0,
    dtype: opt.WeightsDType = "auto",
    device: opt.Device = None,
    deadline: opt.Deadline = 30.0,
    placement: opt.ExpertPlacement = None,
    num_redundant_experts: opt.NumRedundantExperts = 0,
    survive: opt.Survive = 0,
    start_timeout: Annotated[float, opt.scale("Longest wait until the ranks are ready, in seconds.")] = 600.0,
    max_restarts: Annotated[int, opt.steps("Maximum restarts in a row without a finished request in between.")] = 3,
    host: Annotated[str, opt.option("Address to listen on; by default only this host can connect.")] = "127.0.0.1",
    port: Annotated[
        int, opt.option("Port to listen on; 0 for any.", parser=opt.whole(0, 65535), metavar="PORT")
    ] = 8000,
    api_key: Annotated[
        str | None, opt.option("Key required for /v1. Other users see it here; prefer $LOCKSTEP_API_KEY or a file.")
    ] = None,
    api_key_file: Annotated[Path | None, opt.option("File with that key in its first line.")] = None,
    chat_template: Annotated[
        Path | None, opt.option("Jinja file to use instead of the tokenizer's chat template.")
    ] = None,
    max_queue: Annotated[int, opt.count("Maximum sequences waiting for a first token; more get status 429.")] = 1024,
    max_connections: Annotated[int, opt.count("Maximum open connections.")] = 4096,
    max_body_bytes: Annotated[int, opt.count("Maximum size of a request's body.")] = 8 * 2**20,
    read_timeout: Annotated[
        float, opt.scale("Longest wait for a request's head, in seconds; three times as long for its body.")
    ] = 10.0,
    drain: Annotated[
        float, opt.scale("Time for running requests to end after SIGTERM or Ctrl-C, in seconds.", "--drain-s")
    ] = 30.0,
    log_requests: Annotated[opt.LogRequests, opt.option("What to log of each request.")] = "off",
) -> None:
    """Serve a model over ranks of this host, with OpenAI's completions and chats over HTTP."""
    require(
        "starlette", "uvicorn", "httptools", "pydantic", "prometheus_client", "numpy", "transformers", "safetensors"
    )
    from lockstep.commands.serve import ServeCommand, execute, read_api_key
    from lockstep.runner.ranks import EngineOptions
    from lockstep.serve.app import ServeOptions

    engine = EngineOptions(
        model=model, data_parallel_size=data_parallel_size, tensor_parallel_size=tensor_parallel_size,
        max_chunk_size=max_chunk_size, dispatcher=dispatcher, load_balancing=load_balancing,
        max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs, dtype=dtype, device=device,
        kv_capacity_tokens=kv_capacity_tokens, max_model_len=max_model_len, deadline_s=deadline,
        gpu_memory_utilization=gpu_memory_utilization, enable_prefix_caching=prefix_caching,
        max_prefill_delay_steps=max_prefill_delay_steps, start_timeout_s=start_timeout, placement=placement,
        num_redundant_experts=num_redundant_experts, survive=survive,
    )  # fmt: skip
    service = ServeOptions(
        served_model_name or model, read_api_key(api_key, api_key_file), max_queue, max_restarts, max_connections,
        max_body_bytes, read_timeout, drain, log_requests,
    )  # fmt: skip
    execute(ServeCommand(engine, service, host, port, chat_template))
