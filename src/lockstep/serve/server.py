"""Start and end of a service, of its HTTP server, and of what is shown of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from lockstep.errors import ConfigurationError
from lockstep.runner.engine import Engine
from lockstep.serve.api_process import serve_by_processes
from lockstep.serve.connections import serve_http
from lockstep.serve.options import ServeOptions
from lockstep.serve.service import Service

logger = logging.getLogger(__name__)

_OTHER_FILES = 256  # descriptors that are no connections


def open_socket(host: str, port: int) -> socket.socket:
    """Listen; `ConfigurationError` for an address that cannot be used."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = str(error.strerror).partition(" (while")[0]
        raise ConfigurationError(f"{host} port {port} cannot be used: {why}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # clients that have vanished leave
    return listener


async def serve(
    start_engine: Callable[[], Engine],
    options: ServeOptions,
    listener: socket.socket,
    watch: Callable[[Service], Coroutine[Any, Any, None]],
    say: Callable[[str], None],
    end_now: Callable[[int], NoReturn],
) -> None:
    """Serve until a signal comes; the main thread calls it.

    `start_engine` blocks until the ranks are ready, `watch` runs beside, `say` tells the user how the service ends, and
    `end_now` ends the process with a status at a second signal. Raises what has ended the service for good.
    """
    _allow_files(options.max_connections)

    def start() -> Engine:
        """Start an engine; garbage collection then skips what it has loaded, which took 0.2 s without an answer."""
        gc.unfreeze()  # so that what an earlier engine has left can be collected
        engine = start_engine()
        gc.collect()
        gc.freeze()
        return engine

    service = Service(start, options)
    loop, drains, ended = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    numbers: list[int] = []

    def handle(number: int, _: Any) -> None:
        numbers.append(number)
        if len(numbers) > 1:
            end_now(128 + number)
        loop.call_soon_threadsafe(drains.set)

    async def drain() -> None:
        await drains.wait()
        limit = f"at most {options.drain_s:g} s"
        if service.state != "ready":
            limit = f"all cut off, since the service is {service.state}"
        again = "Ctrl-C" if numbers[0] == signal.SIGINT else "SIGTERM"
        counts = f"running {service.num_running}, waiting {service.num_waiting}"
        say(f"draining: {counts}; {limit} ({again} again ends at once)")
        how = await service.drain(options.drain_s)
        left = f", left by clients {how['abort']}" if how["abort"] else ""
        say(f"drained: answered {how['stop'] + how['length']}, cut off {how['error']}{left}")
        ended.set()

    async def run() -> None:
        try:
            await service.run()
        finally:
            if not drains.is_set():  # otherwise the drain says when all has ended
                ended.set()

    async def end(tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if service.engine is not None:
            await asyncio.to_thread(service.engine.close)

    async with contextlib.AsyncExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, handle))
        running, *_ = tasks = [asyncio.create_task(one) for one in (run(), drain(), watch(service))]
        stack.push_async_callback(end, tasks)
        serve_clients = serve_by_processes if options.api_processes > 1 else serve_http
        await serve_clients(service, options, listener, ended)
        if running.done():
            running.result()


def _allow_files(max_connections: int) -> None:
    """Raise this process's limit of open files as far as the connections need it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        logger.warning("at most %d connections at a time: the system allows %d open files", most - _OTHER_FILES, most)
