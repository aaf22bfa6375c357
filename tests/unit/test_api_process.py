"""Requests over ASGI to a service without ranks: in one process, and through both ends of an API process's socket."""

import asyncio
import contextlib
import json
import logging
import re
import socket
import threading
from types import SimpleNamespace

import psutil
import pytest

pytest.importorskip("transformers")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from test_service import FakeEngine, piece, until

from lockstep.engine.sampling_params import Limits
from lockstep.errors import ConfigurationError
from lockstep.runner.engine import Engine
from lockstep.serve import api_process
from lockstep.serve.api_process import Link, RemoteService, _Callers, serve_by_processes
from lockstep.serve.app import make_app
from lockstep.serve.options import ServeOptions
from lockstep.serve.server import open_socket
from lockstep.serve.service import Service

FACES = pytest.mark.parametrize("is_remote", [False, True], ids=["one process", "API process"])
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


class HeldEngine(FakeEngine):
    """Tokenizes only while it is not held, and never generates."""

    def __init__(self):
        super().__init__()
        self.tokenized, self.goes_on = [], threading.Event()

    def prompt_ids(self, index, prompt):
        self.tokenized.append(prompt)
        self.goes_on.wait(20)
        return prompt


class AnsweringEngine(FakeEngine):
    """Checks requests as an engine does, and ends each sequence after one token."""

    prompt_ids, check, check_size = Engine.prompt_ids, Engine.check, Engine.check_size
    _limits = Limits(259, 259, 1000, None)

    def __init__(self):
        super().__init__()
        self.params, self.about = [], {"max_model_len": 1000, "kv_capacity_tokens": None}

    def submit_all(self, calls):
        for listener, requests in calls:
            self.params += [repr(new) for new in requests]
            for new in requests:
                listener._service.post(listener, piece(new.index, finish="stop"))


async def links():
    return [Link(*await asyncio.open_unix_connection(sock=end)) for end in socket.socketpair()]


@contextlib.asynccontextmanager
async def serving(engine, is_remote, **options):
    """A service, and an application that answers with it: directly, or as one of an API process does."""
    options = ServeOptions("tiny", **options)
    service = Service(lambda: engine, options)
    tasks = [asyncio.ensure_future(service.run())]
    await until(lambda: service.state == "ready")
    face = service
    if is_remote:
        ours, theirs = await links()
        face = RemoteService(theirs)
        tasks += map(asyncio.ensure_future, (_Callers(service, ours, None).serve(), face.listen()))
    yield service, make_app(face, options)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def request(app, body, path=COMPLETIONS, gone=None):
    """Send a request; return status, document and headers. The client goes away when `gone` is set."""
    sent, unread = [], [{"type": "http.request", "body": body}]
    gone = gone or asyncio.Event()

    async def receive():
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    method = "GET" if body is None else "POST"
    await app({"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}, receive, send)
    if not sent:
        return None
    content = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(content), dict(sent[0]["headers"])


def ask(app, gone=None, **fields):
    return asyncio.ensure_future(request(app, json.dumps(fields).encode(), gone=gone))


def run(test):
    asyncio.run(asyncio.wait_for(test, 30))


@FACES
def test_sequences_wait_from_their_arrival(is_remote):
    """Not from the end of tokenizing; a full queue is told of before that work."""

    async def test():
        engine = HeldEngine()
        async with serving(engine, is_remote, max_queue=6) as (service, app):
            waiting = [ask(app, prompt=[[1], [2]], n=2)]
            await until(lambda: engine.tokenized)
            assert (service.num_waiting, service.num_running) == (4, 0)
            assert 'vllm:num_requests_waiting{model_name="tiny"} 4.0' in service.metrics.text()
            waiting.append(ask(app, prompt=[1, 2]))
            await until(lambda: service.num_waiting == 5)
            status, document, headers = await asyncio.wait_for(ask(app, prompt=["a", "b"]), 10)
            assert (status, document["error"]["code"], headers[b"retry-after"]) == (429, "queue_full", b"1")
            assert "5 sequences wait already, and at most 6 may" in document["error"]["message"]
            assert engine.tokenized == [[1]]
            engine.goes_on.set()
            await until(lambda: len(engine.taken) == 2)
            assert (service.num_waiting, service.num_running) == (5, 0)
            assert 'lockstep_http_errors_total{status="429"} 1.0' in service.metrics.text()

    run(test())


@FACES
def test_a_client_that_goes_away_before_its_turn_is_not_tokenized_for(is_remote):
    async def test():
        engine, gone = HeldEngine(), asyncio.Event()
        async with serving(engine, is_remote) as (service, app):
            first = ask(app, prompt=[1])
            await until(lambda: engine.tokenized)
            leaving = [ask(app, gone, prompt=[2], n=2), ask(app, gone, prompt=[3])]
            last = ask(app, prompt=[4])
            await until(lambda: service.num_waiting == 5)
            gone.set()
            await until(lambda: service.num_waiting == 2)
            assert [await one for one in leaving] == [None, None]
            engine.goes_on.set()
            await until(lambda: len(engine.taken) == 2)
            assert engine.tokenized == [[1], [4]]
            assert service.metrics.num_ended == {"abort": 3} and not first.done() and not last.done()

    run(test())


@FACES
def test_a_client_that_goes_away_while_it_is_tokenized_for_does_not_run(is_remote):
    async def test():
        engine, gone = HeldEngine(), asyncio.Event()
        async with serving(engine, is_remote) as (service, app):
            ask(app, gone, prompt=[1])
            await until(lambda: engine.tokenized)
            gone.set()
            await until(lambda: not service.num_waiting)
            ask(app, prompt=[2])
            engine.goes_on.set()
            await until(lambda: engine.taken)
            assert [one.requests[0].prompt_token_ids for one in engine.taken] == [[2]]
            assert service.num_waiting == 1

    run(test())


@FACES
def test_the_time_to_the_first_token_contains_the_wait_for_the_tokenizer(is_remote):
    async def test():
        engine = HeldEngine()
        async with serving(engine, is_remote) as (service, app):
            answer = ask(app, prompt=[1])
            await until(lambda: engine.tokenized)
            await asyncio.sleep(0.3)
            engine.goes_on.set()
            await until(lambda: engine.taken)
            service.post(engine.taken[0], piece(finish="stop"))
            status, document, _ = await answer
            assert (status, document["usage"]["prompt_tokens"]) == (200, 1)
            (first_s,) = re.findall(r"vllm:time_to_first_token_seconds_sum\{.*\} (\S+)", service.metrics.text())
            assert float(first_s) >= 0.3

    run(test())


@FACES
def test_what_is_being_tokenized_is_answered_in_a_drain_and_fails_at_its_end(is_remote):
    async def test():
        for limit_s, told in ((20, 200), (0.0, 503)):
            engine = HeldEngine()
            async with serving(engine, is_remote) as (service, app):
                answer = ask(app, prompt=[1])
                await until(lambda engine=engine: engine.tokenized)
                draining = asyncio.ensure_future(service.drain(limit_s))
                if told == 200:
                    await asyncio.sleep(0.05)
                    engine.goes_on.set()
                    await until(lambda engine=engine: engine.taken)
                    service.post(engine.taken[0], piece(finish="stop"))
                assert (await answer)[0] == told
                assert await draining == ({"stop": 1} if told == 200 else {"error": 1})
                engine.goes_on.set()

    run(test())


@FACES
def test_a_request_that_is_larger_than_the_queue_can_never_fit(is_remote):
    """Another try would not help."""

    async def test():
        engine = AnsweringEngine()
        async with serving(engine, is_remote, max_queue=8) as (_, app):
            for fields, param in (({"prompt": "a", "n": 9}, "n"), ({"prompt": [[1]] * 9}, "prompt")):
                status, document, headers = await ask(app, **fields)
                assert (status, document["error"]["param"]) == (400, param)
                assert "must be <= 8" in document["error"]["message"] and "got 9" in document["error"]["message"]
                assert b"retry-after" not in headers
            status, document, _ = await ask(app, prompt="a", n=8)
            assert (status, len(document["choices"])) == (200, 8)
            status, document, _ = await ask(app, prompt=["a", "b"], n=65)
            assert (status, document["error"]["message"]) == (400, "n must be >= 1, and n * prompts <= 128, got 65 * 2")

    run(test())


VALUES = [
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-0.0", "0", "1e-400", str(2**70), str(-(2**70)), "10" * 2500),
    *("null", "true", '"1"', "[]", "[1e999]", "[[]]", "{}", r'"\ud800"', r'"\ud83d\ude00"', r'"\u0000"', '"\ufffd"'),
]
BODIES = [
    *(
        (f'{{"prompt": [1], "{field}": {value}}}'.encode(), COMPLETIONS)
        for field in (
            "temperature",
            "top_p",
            "repetition_penalty",
            "n",
            "seed",
            "max_tokens",
            "stop",
            "user",
            "unknown",
        )
        for value in VALUES
    ),
    *((f'{{"prompt": {value}}}'.encode(), COMPLETIONS) for value in VALUES),
    *((f'{{"messages": [{{"role": "user", "content": {value}}}]}}'.encode(), CHATS) for value in VALUES),
    (b'{"prompt": [1], "stop": "\xff"}', COMPLETIONS),
    (b'{"prompt": [1], "stop": "\xed\xa0\x80"}', COMPLETIONS),
    (b'\xef\xbb\xbf{"prompt": [1]}', COMPLETIONS),
    (b'{"prompt": [1], "n": 2, "n": 3}', COMPLETIONS),
    (b'{"prompt": [1], "stream_options": null, "metadata": {"a": NaN}}', COMPLETIONS),
]


def test_api_processes_refuse_and_take_what_one_process_does():
    """Any value reaches the launcher as it was sent: those that JSON lacks, large ones, half surrogate pairs."""

    async def answers(is_remote):
        engine, found = AnsweringEngine(), []
        async with serving(engine, is_remote, max_queue=200) as (_, app):
            for body, path in BODIES:
                status, document, _ = await request(app, body, path)
                error = document.get("error", {"message": document.get("choices")})
                found.append((body, status, error["message"], error.get("param"), engine.params.copy()))
                engine.params.clear()
        return found

    async def test():
        one, remote = await answers(False), await answers(True)
        for alone, beside in zip(one, remote, strict=True):
            assert alone == beside
        assert {status for _, status, *_ in one} == {200, 400, 422}
        told = {body: message for body, _, message, *_ in one}
        expected = "temperature must be a number in 0..10000, got nan"
        assert told[b'{"prompt": [1], "temperature": NaN}'] == expected

    run(test())


def test_all_that_is_open_ends_when_the_launcher_ends_an_api_process(caplog):
    """Questions and requests, those before a token and those after it; and what comes later."""

    async def test():
        ours, theirs = await links()
        remote = RemoteService(theirs)
        app, listening = make_app(remote, ServeOptions("tiny")), asyncio.ensure_future(remote.listen())
        asked = [asyncio.ensure_future(request(app, None, path)) for path in ("/health", "/metrics", "/v1/models")]
        asked += [ask(app, prompt="a") for _ in range(4)]
        messages = await ours.receive()
        assert [kind for _, kind, *_ in messages] == ["ask"] * 3 + ["start"] * 4
        (question, *_), *_, (begun, *_), (failed, *_), (complete, *_) = messages
        ours.send(begun, "token", *piece())
        ours.send(failed, "error", 400, "a wrong value", "prompt", None, {})
        ours.send(complete, "token", *piece(text="all", finish="stop"))
        asked[0].cancel()
        ours.send(question, "answer", {"status": "ready"})  # nobody waits for it any more
        ours.send(None, "end")
        await asyncio.wait_for(listening, 10)
        asked += [asyncio.ensure_future(request(app, None, "/health")), ask(app, prompt="a")]
        answers = await asyncio.wait_for(asyncio.gather(*asked[1:]), 10)
        status, document, _ = answers.pop(5)  # all that had ended before
        assert (status, document["choices"][0]["text"]) == (200, "all")
        status, document, _ = answers.pop(4)
        assert (status, document["error"]["message"]) == (400, "a wrong value")
        for status, document, _ in answers:
            assert (status, document["error"]["code"]) == (503, "service_ended")
        ours.close()
        for _ in range(20):
            remote.refused(503)
            await asyncio.sleep(0)
        assert not caplog.records

    run(test())


def test_an_api_process_that_ends_after_a_long_life_is_no_failure(monkeypatch, caplog):
    monkeypatch.setattr(api_process, "_STEADY_S", 0.0)
    monkeypatch.setattr(api_process, "_PAUSE_S", 0.0)

    def is_api_process(one):
        with contextlib.suppress(psutil.Error):  # it has ended
            return "lockstep.serve.api_process" in one.cmdline()

    def children():
        return list(filter(is_api_process, psutil.Process().children()))

    async def test():
        ended, service = asyncio.Event(), SimpleNamespace()
        with open_socket("127.0.0.1", 0) as listener, caplog.at_level(logging.WARNING):
            options = ServeOptions("tiny", api_processes=1, max_restarts=3)
            serving = asyncio.ensure_future(serve_by_processes(service, options, listener, ended))
            await until(children)
            (victim,) = children()
            victim.kill()
            await until(lambda: children() and children() != [victim])
            ended.set()
            await serving
        (line,) = [record.getMessage() for record in caplog.records if "started again" in record.getMessage()]
        assert re.fullmatch(r"an API process is started again \(after \d+ s\): .*SIGKILL.*", line), line

    run(test())


def histogram(service, name):
    """Count and sum of a histogram of `/metrics`."""
    found = dict(re.findall(rf"vllm:{name}_(count|sum)\{{.*\}} (\S+)", service.metrics.text()))
    return float(found["count"]), float(found["sum"])


def test_times_are_those_of_each_sequence(monkeypatch):
    """Arrival at 0; tokens of two sequences at 1 and 4, and at 3 and 9; the third has none when the client leaves."""
    clock = SimpleNamespace(monotonic=lambda: clock.now_s, now_s=0.0)
    monkeypatch.setattr("lockstep.serve.service.time", clock)

    async def test():
        engine, gone = HeldEngine(), asyncio.Event()
        engine.goes_on.set()
        async with serving(engine, False) as (service, app):
            asked = ask(app, gone, prompt=[1], n=3)
            await until(lambda: engine.taken)
            for clock.now_s, sequence, finish in ((1, 0, None), (3, 1, None), (4, 0, "stop"), (9, 1, None)):
                num_tokens = service.metrics.num_tokens
                service.post(engine.taken[0], piece(sequence, finish=finish))
                await until(lambda: service.metrics.num_tokens > num_tokens)  # noqa: B023 (called in this turn)
            clock.now_s = 20
            gone.set()
            await asked
            assert histogram(service, "time_to_first_token_seconds") == (2, 1 + 3)
            assert histogram(service, "inter_token_latency_seconds") == (2, 3 + 6)
            assert histogram(service, "e2e_request_latency_seconds") == (3, 4 + 20 + 20)

    run(test())


@FACES
def test_an_error_of_our_own_is_logged_and_told_without_details(is_remote, caplog):
    class Faulty(FakeEngine):
        def prompt_ids(self, index, prompt):
            raise TypeError("a fault of ours") if prompt == [1] else ConfigurationError("prompt 0 is wrong")

    async def test():
        async with serving(Faulty(), is_remote) as (service, app):
            status, document, _ = await ask(app, prompt=[1])
            assert status == 500 and "fault of ours" not in document["error"]["message"]
            (record,) = caplog.records
            assert "a request could not be started" in record.getMessage() and "a fault of ours" in caplog.text
            assert (await ask(app, prompt=[2]))[0] == 400
            assert len(caplog.records) == 1 and not service.num_waiting and not service.metrics.num_ended

    run(test())
