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
        if not self._writer.is_closing():  # asyncio logs what is written after the other side has gone
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
            while True:
                for number, kind, *rest in await self._receive():
                    if kind == "start":
                        self._start(number, *rest)
                    elif kind == "leave":
                        if number in self._generations:  # otherwise it was refused at its arrival
                            self._service.leave(self._generations.pop(number))
                    elif kind == "refused":
                        self._service.refused(*rest)
                    elif kind == "ask":
                        self._link.send(number, "answer", await self._service.ask(*rest))
        except (EOFError, ConnectionError):
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

    def _start(self, number: int, is_chat: bool, body: str, num_sequences: int, answer_id: str) -> None:
        tell, tell_size = partial(self._tell, number), partial(self._link.send, number, "size")
        try:
            asked = parse(ChatRequest if is_chat else CompletionRequest, body.encode())
            self._generations[number] = self._service.admit(asked, num_sequences, answer_id, tell, tell_size)
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("a request could not be started")
            tell(as_api_error(error))

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
            life_s = time.monotonic() - began_s
            num_failures = 0 if life_s > _STEADY_S else num_failures + 1
            if num_failures > options.max_restarts:
                what = f"an API process ended within {_STEADY_S:g} s of its start ({num_failures} in a row)"
                raise LockstepError(f"{what}: {why}")
            count = f"failure {num_failures} of {options.max_restarts}" if num_failures else f"after {life_s:.0f} s"
            logger.warning("an API process is started again (%s): %s", count, why)
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
        self._streams: dict[int, Stream] = {}  # until their readers leave
        self._has_ended = False

    async def listen(self) -> None:
        """Handle the launcher's messages until it ends this process; afterwards, nothing is answered any more."""
        with contextlib.suppress(EOFError, ConnectionError):
            while not self._has_ended:
                for message in await self._link.receive():
                    self._take(*message)
        self._has_ended = True
        for future in self._asked.values():
            if not future.done():
                future.set_exception(_ended())
        for stream in self._streams.values():
            stream.take(_ended())

    def _take(self, number: int, kind: str, *rest: Any) -> None:
        stream = self._streams.get(number)  # None once its reader has left
        if kind == "end":
            self._has_ended = True
        elif kind == "answer":
            future = self._asked.get(number)
            if future is not None and not future.done():  # it may be cancelled
                future.set_result(*rest)
        elif stream is not None:
            if kind == "token":
                stream.take(Piece(*rest))
            elif kind == "size":
                (stream.num_prompt_tokens,) = rest
            else:
                stream.take(ApiError(*rest[:4], **rest[4]))

    async def say_alive(self) -> None:
        """Let the launcher know that this process's event loop runs."""
        while True:
            self._link.send(None, "alive")
            await asyncio.sleep(_BEAT_S)

    async def ask(self, what: Question) -> Any:
        """See `Service`."""
        number = self._send_new("ask", what)
        self._asked[number] = future = asyncio.get_running_loop().create_future()
        try:
            return await future
        finally:
            del self._asked[number]

    def start(self, asked: CompletionRequest | ChatRequest, body: bytes, num_sequences: int, answer_id: str) -> Stream:
        """See `Service`. The launcher reads the body again: a model written as JSON would lose NaN and infinities."""
        number = self._send_new("start", isinstance(asked, ChatRequest), body.decode(), num_sequences, answer_id)
        self._streams[number] = stream = Stream(num_sequences, 0)
        stream.leave = partial(self._leave, number)
        return stream

    def refused(self, status: int) -> None:
        """See `Service`."""
        self._link.send(None, "refused", status)

    def _leave(self, number: int) -> None:
        del self._streams[number]
        self._link.send(number, "leave")

    def _send_new(self, *message: Any) -> int:
        if self._has_ended:
            raise _ended()
        number = next(self._numbers)
        self._link.send(number, *message)
        return number


def _ended() -> ApiError:
    return ApiError(503, "the service has ended", code="service_ended", Retry_After="5")


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
