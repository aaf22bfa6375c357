"""`lockstep.Engine`: prompts in, outputs out, over ranks that it starts itself."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import lockstep.errors
from lockstep.engine.outputs import RequestOutput
from lockstep.engine.sampling_params import SamplingParams
from lockstep.engine.text import Detokenizer
from lockstep.errors import ConfigurationError, LockstepError, PeerFailedError, RankAbsentError
from lockstep.runner.rank_loop import add_message
from lockstep.runner.ranks import EngineOptions
from lockstep.runner.router import Router
from lockstep.workload.policies import SchedulerState

_STOP_S = 10.0


class Engine:
    """Generates text with a Mixture-of-Experts model over several ranks of this host.

    The ranks are processes that end with this one. A script needs no `if __name__ == "__main__"`.

    Args:
        model: a checkpoint's folder or Hub id.
        data_parallel_size: ranks with requests of their own, >= 1.
        **options: see `EngineOptions`.

    Attributes:
        about: what rank 0 said when all were ready: context, pages of the cache, kernels, dispatcher.

    Raises:
        ConfigurationError: options or a checkpoint that cannot work.
        RankAbsentError: ranks that were not ready in time.
        PeerFailedError: a rank that failed, by number.

    Example:
        >>> from lockstep import Engine, SamplingParams  # doctest: +SKIP
        >>> with Engine("path/to/Qwen3-30B-A3B", data_parallel_size=4) as engine:  # doctest: +SKIP
        ...     for output in engine.generate(["Once upon a time"], SamplingParams(max_tokens=64)):
        ...         print(output.text)
    """

    def __init__(self, model: str | os.PathLike[str], *, data_parallel_size: int = 1, **options: Any) -> None:
        unknown = set(options) - set(EngineOptions.__dataclass_fields__)
        if unknown:
            raise ConfigurationError(f"Engine has no option {sorted(unknown)[0]!r}")
        self.options = EngineOptions(str(model), data_parallel_size, **options)
        self._tokenizer = _load_tokenizer(self.options.model)
        self._events: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        self._failure: LockstepError | None = None
        self._ranks = _Ranks(self.options, self._events)
        self.about: dict[str, Any] = {}
        try:
            self._await_ready()
        except BaseException:
            self._ranks.kill()
            raise
        detokenizer = Detokenizer(self._tokenizer) if self._tokenizer is not None else None
        self._router = Router(
            data_parallel_size,
            self.options.load_balancing,
            eos_token_ids=self.about["eos_token_ids"],
            detokenizer=detokenizer,
        )

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Generate for all prompts, and yield each output when it is done; `index` says which prompt it belongs to.

        Args:
            prompts: texts, or lists of token ids.
            sampling_params: for all of them, or one for each; None for the defaults.

        Raises:
            ConfigurationError: a prompt or parameters that cannot work, naming the prompt; before anything runs.
            LockstepError: a rank failed; the engine is closed then.
        """
        if isinstance(prompts, str):
            raise ConfigurationError("prompts must be a list of prompts, got one string")
        params = sampling_params if sampling_params is not None else SamplingParams()
        all_params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(all_params) != len(prompts):
            raise ConfigurationError(f"{len(prompts)} prompts, but {len(all_params)} sampling_params")
        ids = [self._prompt_ids(index, prompt) for index, prompt in enumerate(prompts)]
        for index, (prompt_ids, one) in enumerate(zip(ids, all_params, strict=True)):
            self._check(index, prompt_ids, one)
        return self._run(ids, all_params)

    def close(self) -> None:
        """End the ranks, once they have nothing left to do. Closing twice does nothing."""
        self._ranks.stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._ranks.kill()

    def _run(self, ids: list[list[int]], params: list[SamplingParams]) -> Iterator[RequestOutput]:
        mine: set[int] = set()
        try:
            for index, (prompt_ids, one) in enumerate(zip(ids, params, strict=True)):
                entry = self._router.add(prompt_ids, one, index)
                mine.add(entry.request_id)
                self._ranks.send(entry.rank, add_message(entry.request_id, prompt_ids, one))
            while mine:
                for output in self._next_outputs():
                    mine.discard(output.request_id)
                    yield output
        finally:
            for request_id in mine:  # the caller has stopped listening
                if (aborted := self._router.abort(request_id)) is not None and self._ranks.alive:
                    self._ranks.send(aborted.rank, {"abort": request_id})

    def _next_outputs(self) -> list[RequestOutput]:
        """Wait for a message of a rank, and return what it has ended."""
        rank, message = self._next_event(None)
        if "refused" in message:
            self._router.abort(message["refused"])
            raise ConfigurationError(message["why"])
        if "tokens" not in message or rank % self.options.tensor_parallel_size:
            return []
        data_rank = rank // self.options.tensor_parallel_size
        self._router.observe(data_rank, SchedulerState(*message["state"]), message["taken_in"])
        outputs = []
        for request_id, position, token, logprob, top, finish in message["tokens"]:
            taken = self._router.take(request_id, position, token, logprob, top)
            if taken is not None and taken[1].finish_reason is not None:
                if finish is None:  # a stop string, of which the rank knows nothing
                    self._ranks.send(data_rank, {"abort": request_id})
                outputs.append(taken[0].output())
        return outputs

    def _next_event(self, timeout_s: float | None) -> tuple[int, dict[str, Any]]:
        if self._failure is not None:
            raise self._failure
        try:
            rank, message = self._events.get(timeout=timeout_s)
        except queue.Empty:
            raise RankAbsentError(f"no rank answered within {timeout_s:.0f} s") from None
        if "failed" in message:
            self._failure = self._failure_of(rank, message)
            self._ranks.kill()
            raise self._failure
        return rank, message

    def _failure_of(self, rank: int, message: dict[str, Any]) -> LockstepError:
        """The cause, not its echoes: a rank that reports another's failure is asked last."""
        failures = [(rank, message)]
        until = time.monotonic() + 3.0
        while message["failed"] in ("PeerFailedError", "RankAbsentError") and time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                other, message = self._events.get(timeout=max(0.01, until - time.monotonic()))
                if "failed" in message:
                    failures.append((other, message))
                else:
                    message = failures[0][1]
        rank, message = failures[-1] if failures[-1][1]["failed"] not in ("PeerFailedError",) else failures[0]
        kind = getattr(lockstep.errors, message["failed"], None)
        if isinstance(kind, type) and issubclass(kind, LockstepError) and kind is not PeerFailedError:
            return kind(message["why"])
        return PeerFailedError(f"rank {rank} failed: {message['why']}", rank, message["why"])

    def _await_ready(self) -> None:
        ends = time.monotonic() + self.options.start_timeout_s
        missing = set(range(self.options.world_size))
        while missing:
            try:
                rank, message = self._next_event(max(0.0, ends - time.monotonic()))
            except RankAbsentError:
                late = ", ".join(map(str, sorted(missing)))
                raise RankAbsentError(
                    f"rank {late} was not ready within {self.options.start_timeout_s:g} s", tuple(sorted(missing))
                ) from None
            if "ready" in message:
                missing.discard(rank)
                self.about = message["ready"] if rank == 0 else self.about

    def _prompt_ids(self, index: int, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self._tokenizer is None:
            raise ConfigurationError(f"prompt {index} is a text, but {self.options.model} has no tokenizer")
        ids: list[int] = self._tokenizer(prompt)["input_ids"]
        return ids

    def _check(self, index: int, ids: list[int], params: SamplingParams) -> None:
        """What `RankEngine.add` would refuse, before anything is sent."""
        if not ids:
            raise ConfigurationError(f"prompt {index} has no tokens")
        if (wrong := next((t for t in ids if not 0 <= t < self.about["vocab_size"]), None)) is not None:
            raise ConfigurationError(
                f"prompt {index} has token {wrong}, but the model's embedding has {self.about['vocab_size']} entries"
            )
        limit = min(self.about["max_model_len"], self.about["kv_tokens"] or self.about["max_model_len"])
        if len(ids) + params.max_tokens > limit:
            raise ConfigurationError(
                f"prompt {index} has {len(ids)} tokens and max_tokens is {params.max_tokens}, together more than the "
                f"{limit} that a request may have"
            )


class _Ranks:
    """The processes, a socket to each, and a thread that listens to each."""

    def __init__(self, options: EngineOptions, events: queue.SimpleQueue[tuple[int, dict[str, Any]]]) -> None:
        self._options = options
        self._events = events
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.alive = True
        self._stopping = False
        self._store = _open_store() if options.world_size > 1 else None
        port = self._store.port if self._store is not None else 0
        for rank in range(options.world_size):
            mine, theirs = socket.socketpair()
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(options.world_size),
                "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            }
            process = subprocess.Popen(
                [sys.executable, "-m", "lockstep.runner.worker", str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
            theirs.close()
            self._processes.append(process)
            self._sockets.append(mine)
            thread = threading.Thread(target=self._listen, args=(rank,), name=f"lockstep-rank-{rank}", daemon=True)
            self._threads.append(thread)
            thread.start()
            self._send_one(rank, {"options": options.to_json(), "store_port": port})

    def send(self, data_rank: int, message: dict[str, Any]) -> None:
        """Send a message to all processes of a data-parallel rank."""
        size = self._options.tensor_parallel_size
        for rank in range(data_rank * size, (data_rank + 1) * size):
            self._send_one(rank, message)

    def stop(self) -> None:
        """Let the ranks end by themselves; end those that do not."""
        if not self.alive:
            return
        self._stopping = True
        for rank in range(self._options.world_size):
            self._send_one(rank, {"stop": True})
        until = time.monotonic() + _STOP_S
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End all ranks now."""
        self.alive, self._stopping = False, True
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()
        for connection in self._sockets:
            connection.close()

    def _send_one(self, rank: int, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a rank that is gone is reported by the thread that listens to it
            self._sockets[rank].sendall(json.dumps(message).encode() + b"\n")

    def _listen(self, rank: int) -> None:
        with contextlib.suppress(OSError, ValueError), self._sockets[rank].makefile("rb") as lines:
            for line in lines:
                self._events.put((rank, json.loads(line)))
        if not self._stopping:
            code = self._processes[rank].wait()
            self._events.put((rank, {"failed": "died", "why": f"its process ended with exit code {code}"}))


def _open_store() -> Any:
    import torch.distributed as dist

    # Of its own accord the store would listen on every interface.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError):  # token ids only
        return None
