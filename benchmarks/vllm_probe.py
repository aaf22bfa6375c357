"""What `bench_vllm_exchange.py` adds to vLLM's own processes: clocks, and a common start of each case."""

import os
import time
from pathlib import Path


class Probe:
    """Mixed into vLLM's worker: a row per step of [wall s, tokens, requests, event before forward, event after it]."""

    def probe_install(self):
        """Begin to time; return which method runs the experts."""
        import torch

        runner, rows = self.model_runner, []
        self.probe_rows = rows
        execute, forward = runner.execute_model, runner._model_forward

        def timed_execute(scheduler_output, *args, **options):
            tokens = scheduler_output.total_num_scheduled_tokens
            if tokens:
                rows.append([time.perf_counter(), tokens, len(scheduler_output.num_scheduled_tokens), None, None])
            return execute(scheduler_output, *args, **options)

        def timed_forward(*args, **options):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            result = forward(*args, **options)
            after.record()
            if rows and rows[-1][3] is None:
                rows[-1][3:] = [before, after]
            return result

        runner.execute_model, runner._model_forward = timed_execute, timed_forward
        method = next(
            (
                m.quant_method
                for m in runner.get_model().modules()
                if hasattr(m, "w13_weight") and hasattr(m, "quant_method")
            ),
            None,
        )
        return {
            "method": type(method).__name__, "exchange": getattr(method, "_exchange", None) is not None,
            "cudagraph_mode": str(self.vllm_config.compilation_config.cudagraph_mode), "pid": os.getpid(),
        }  # fmt: skip

    def probe_weights(self, deviation):
        """Fill weights as Transformers makes them, norms 1: the router then spreads tokens over all experts."""
        import torch

        for index, (name, parameter) in enumerate(self.model_runner.get_model().named_parameters()):
            if not parameter.is_floating_point():
                continue
            generator = torch.Generator(device=parameter.device).manual_seed(index)
            with torch.inference_mode():
                if "norm" in name:
                    parameter.fill_(1.0)
                    continue
                for part in parameter.data.split(1) if parameter.dim() == 3 else (parameter.data,):
                    part.normal_(0.0, deviation, generator=generator)
        torch.cuda.synchronize()

    def probe_begin(self):
        """Forget the rows so far."""
        del self.probe_rows[:]

    def probe_take(self):
        """Return rows as [wall ms, tokens, requests, GPU ms at the forward's start, forward ms]."""
        import torch

        torch.cuda.synchronize()
        rows = [row for row in self.probe_rows if row[3] is not None]
        return [
            [1e3 * (r[0] - rows[0][0]), r[1], r[2], rows[0][3].elapsed_time(r[3]), r[3].elapsed_time(r[4])]
            for r in rows
        ]


def gate():
    """Plugin of vLLM: an engine begins a case when all of its requests have come, so one step holds all prompts."""
    path = os.environ.get("BENCH_GATE")
    if not path:
        return
    from vllm.v1.engine.core import EngineCoreProc

    if hasattr(EngineCoreProc, "bench_gated"):
        return
    process = EngineCoreProc._process_input_queue

    def gated(self):
        process(self)
        if self.scheduler.requests and os.path.exists(path):
            expected = int(Path(path).read_text())
            os.remove(path)
            while len(self.scheduler.requests) < expected:
                self._handle_client_request(*self.input_queue.get(timeout=60))

    EngineCoreProc._process_input_queue = gated
    EngineCoreProc.bench_gated = True
