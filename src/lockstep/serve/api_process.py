"""HTTP in processes of its own: they parse, format and send; the launcher's service keeps the ledger.

Each API process shares a socket with the launcher. A frame is a length in four bytes and a JSON list of messages. A
message is the number of a request, given by the API process, a kind, and its arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lockstep.errors import LockstepError
from lockstep.runner.processes import end_with, how_it_ended
from lockstep.serve.answers import Piece, Stream
from lockstep.serve.connections import serve_http
from lockstep.serve.errors import ApiError, as_api_error
from lockstep.serve.options import ServeOptions
from lockstep.serve.schema import ChatRequest, CompletionRequest, parse

if TYPE_CHECKING:
    from lockstep.serve.service import Generation, Question, Service

logger = logging.getLogger(__name__)

_PAUSE_S = 1.0  # between the end of a process and the start of the next
_BEAT_S = 1.0  # between two heartbeats of a process
_START_BEATS, _SILENT_BEATS = 60, 10  # silence after which a process is killed: before its first heartbeat, afterwards
_END_S = 10.0  # until a process that was told to end is killed
_STEADY_S = 120.0  # a process that ends sooner has failed


class Link:
    """One end of the socket; messages sent in one turn of the event loop share a frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._outbox: list[Any] = []

    def send(self, *message: Any) -> None:
        """Send a message at the end of this turn of the event loop."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    async def receive(self) -> list[Any]:
        """Return the next frame's messages; raise `EOFError` or `ConnectionError` once the other side has gone."""
        size = int.from_bytes(await self._reader.readexactly(4), "big")
        return list(json.loads(await self._reader.readexactly(size)))

    def close(self) -> None:
        """Close the socket."""
        self._writer.close()

    def _flush(self) -> None:
        data = json.dumps(self._outbox).encode()
        self._outbox.clear()
        self._writer.write(len(data).to_bytes(4, "big") + data)


class _Callers:
    """All requests of one API process, in the launcher."""

    def __init__(self, service: Service, link: Link, process: asyncio.subprocess.Process) -> None:
        self._service, self._link, self._process = service, link, process
        self._generations: dict[int, Generation] = {}
        self._patience = _START_BEATS

    async def serve(self) -> None:
        """Handle the process's messages until it ends, then release its requests."""
        try:
            async with asyncio.TaskGroup() as starts:
                while True:
                    for number, kind, *rest in await self._receive():
                        if kind == "start":
                            starts.create_task(self._start(number, *rest))
                        elif kind == "leave":
                            self._service.leave(self._generations.pop(number))
                        elif kind == "refused":
                            self._service.refused(*rest)
                        elif kind == "ask":
                            self._link.send(number, "answer", await self._service.ask(*rest))
        except* (EOFError, ConnectionError):
            pass
        finally:
            for generation in self._generations.values():
                self._service.leave(generation)

    async def _receive(self) -> list[Any]:
        """Return the next messages; kill a process that has been silent for too long."""
        receiving = asyncio.ensure_future(self._link.receive())
        for _ in range(self._patience):  # time in which the launcher was stopped counts as one beat
            await asyncio.wait([receiving], timeout=_BEAT_S)
            if receiving.done():
                break
        else:
            logger.warning("API process %d is silent and is killed", self._process.pid)
            self._process.kill()
        self._patience = _SILENT_BEATS
        return await receiving

    async def _start(self, number: int, is_chat: bool, body: str, answer_id: str) -> None:
        tell = partial(self._tell, number)
        try:
            asked = parse(ChatRequest if is_chat else CompletionRequest, body.encode())
            generation = self._service.submit(await self._service.prepare(asked, answer_id), tell)
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("a request could not be started")
            tell(as_api_error(error))
        else:
            self._generations[number] = generation
            self._link.send(number, "stream", generation.num_open, generation.num_prompt_tokens)

    def _tell(self, number: int, news: Piece | ApiError) -> None:
        if isinstance(news, ApiError):
            self._link.send(number, "error", news.status, news.message, news.param, news.code, news.headers)
        else:
            self._link.send(number, "token", *news)


async def serve_by_processes(
    service: Service, options: ServeOptions, listener: socket.socket, ended: asyncio.Event
) -> None:
    """Serve HTTP by `api_processes` processes until `ended`; one that dies or falls silent is started again.

    Raises:
        LockstepError: more than `max_restarts` starts in a row have failed.
    """
    each = replace(options, max_connections=-(-options.max_connections // options.api_processes))

    async def keep() -> None:
        num_failures = 0
        while not ended.is_set():
            began_s = time.monotonic()
            ours, theirs = socket.socketpair()
            files = (listener.fileno(), theirs.fileno())
            command = (sys.executable, "-m", __name__, *map(str, (*files, os.getpid())))
            process = await asyncio.create_subprocess_exec(*command, pass_fds=files)
            theirs.close()
            link = Link(*await asyncio.open_unix_connection(sock=ours))
            link.send(asdict(each))
            ending = asyncio.ensure_future(end(link, process))
            await _Callers(service, link, process).serve()
            why = how_it_ended(await process.wait())
            ending.cancel()
            link.close()
            if ended.is_set():
                return
            num_failures = 0 if time.monotonic() - began_s > _STEADY_S else num_failures + 1
            if num_failures > options.max_restarts:
                what = f"an API process ended within {_STEADY_S:g} s of its start ({num_failures} in a row)"
                raise LockstepError(f"{what}: {why}")
            logger.warning(
                "an API process is started again (failure %d of %d): %s", num_failures, options.max_restarts, why
            )
            await asyncio.sleep(_PAUSE_S)

    async def end(link: Link, process: asyncio.subprocess.Process) -> None:
        await ended.wait()
        link.send(None, "end")
        await asyncio.sleep(_END_S)
        process.kill()

    keeping = [asyncio.ensure_future(keep()) for _ in range(options.api_processes)]
    try:
        await asyncio.gather(*keeping)
    except Exception as error:
        service.give_up(error)
        ended.set()
        await asyncio.wait(keeping)
        raise


class RemoteService:
    """The launcher's service, as an API process uses it."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._streams: dict[int, Stream] = {}

    async def listen(self) -> None:
        """Handle the launcher's messages until it ends this process."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                for number, kind, *rest in await self._link.receive():
                    if kind == "token":
                        if number in self._streams:
                            self._streams[number].take(Piece(*rest))
                    elif kind == "answer":
                        self._asked.pop(number).set_result(*rest)
                    elif kind == "stream":
                        self._streams[number] = stream = Stream(*rest)
                        stream.leave = partial(self._leave, number)
                        self._asked.pop(number).set_result(stream)
                    elif kind == "error":
                        error = ApiError(*rest[:4], **rest[4])
                        if number in self._asked:
                            self._asked.pop(number).set_exception(error)
                        elif number in self._streams:
                            self._streams[number].take(error)
                    else:
                        return

    async def say_alive(self) -> None:
        """Let the launcher know that this process's event loop runs."""
        while True:
            self._link.send(None, "alive")
            await asyncio.sleep(_BEAT_S)

    async def ask(self, what: Question) -> Any:
        """See `Service`."""
        return await self._call("ask", what)

    async def start(self, asked: CompletionRequest | ChatRequest, answer_id: str) -> Stream:
        """See `Service`."""
        body = asked.model_dump_json(exclude_unset=True)
        stream: Stream = await self._call("start", isinstance(asked, ChatRequest), body, answer_id)
        return stream

    def refused(self, status: int) -> None:
        """See `Service`."""
        self._link.send(None, "refused", status)

    def _leave(self, number: int) -> None:
        del self._streams[number]
        self._link.send(number, "leave")

    async def _call(self, *message: Any) -> Any:
        number = next(self._numbers)
        self._asked[number] = future = asyncio.get_running_loop().create_future()
        self._link.send(number, *message)
        return await future


async def _main(listener: socket.socket, link: socket.socket) -> None:
    opened = Link(*await asyncio.open_unix_connection(sock=link))
    ((options,),) = await opened.receive()
    service, ended = RemoteService(opened), asyncio.Event()
    listening = asyncio.ensure_future(service.listen())
    listening.add_done_callback(lambda _: ended.set())
    living = asyncio.ensure_future(service.say_alive())
    await serve_http(service, ServeOptions(**options), listener, ended)
    living.cancel()


if __name__ == "__main__":
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # the launcher gets them too, and says when to end
        signal.signal(signal_number, signal.SIG_IGN)
    end_with(int(sys.argv[3]))
    asyncio.run(_main(*(socket.socket(fileno=int(number)) for number in sys.argv[1:3])))
