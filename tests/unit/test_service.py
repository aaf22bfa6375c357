"""The service without ranks: what becomes of requests when engines are lost, and how tokens become events."""

import asyncio
import json
import os
import re
import signal
import threading

import pytest

pytest.importorskip("transformers")
pytest.importorskip("starlette")

from lockstep.errors import ConfigurationError, PeerFailedError
from lockstep.models.tiny import byte_tokenizer
from lockstep.runner.front import EngineStats
from lockstep.runner.options import EngineOptions
from lockstep.serve.answers import Form, Piece, Stream
from lockstep.serve.errors import ApiError
from lockstep.serve.options import ServeOptions
from lockstep.serve.schema import CompletionRequest
from lockstep.serve.server import open_socket, serve
from lockstep.serve.service import Service

LOST = PeerFailedError("rank 1 failed: it died", 1, "it died")


class FakeEngine:
    """Takes requests, and does what the test says."""

    def __init__(self):
        self.error, self.taken, self.batches, self.abandoned, self.is_closed = None, [], [], [], False
        self.tokenizer = byte_tokenizer()
        self.stats, self.options = EngineStats(), EngineOptions("tiny")
        self.about = {"max_model_len": 64, "kv_capacity_tokens": None}

    def prompt_ids(self, index, prompt):
        return prompt

    def check(self, index, ids, params):
        pass

    def ranks(self):
        return []

    def submit_all(self, calls):
        self.taken += [listener for listener, _ in calls]
        self.batches.append(len(calls))
        for listener, _ in calls if self.error is not None else ():
            listener.on_error(self.error)

    def abandon(self, listener):
        self.abandoned.append(listener)

    def forget(self, listener):
        pass

    def close(self):
        self.is_closed = True

    def die(self):
        self.error = LOST
        for listener in self.taken:
            listener.on_error(LOST)


def submit(service, count=1):
    """A generation of `count` sequences, whose tokens go to a stream."""
    asked, stream = CompletionRequest(prompt=[[1, 2]] * count), Stream(count, 2)
    return service.admit(asked, count, "a", stream.take, lambda size: None)


def stream_of(generation):
    return generation.tell.__self__


def serving(test, max_queue=16, max_restarts=5, starts=None, grace_s=0.0):
    """Run `test(service, engines)` beside a service whose engines it can kill, and `grace_s` longer."""
    engines = []

    def start():
        if starts is not None:
            starts()
        engines.append(FakeEngine())
        return engines[-1]

    async def main():
        service = Service(start, ServeOptions("tiny", max_queue=max_queue, max_restarts=max_restarts))
        running = asyncio.ensure_future(service.run())
        testing = asyncio.ensure_future(test(service, engines))
        await asyncio.wait((running, testing), return_when=asyncio.FIRST_COMPLETED)
        if testing.done():
            running.cancel()
            return testing.result()
        await asyncio.wait([testing], timeout=grace_s)
        testing.cancel()
        return running.result()

    return asyncio.run(asyncio.wait_for(main(), 30))


def ended(metrics):
    """Sequences by how they ended, as `/metrics` says it."""
    found = re.findall(r'vllm:request_success_total\{finished_reason="(\w+)".*\} (\d+)', metrics.text())
    return {reason: int(count) for reason, count in found}


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def piece(sequence=0, text="a", finish=None, tokens=None):
    return Piece(sequence, text, tokens, finish)


def test_what_waits_is_kept_and_what_has_begun_is_lost_with_its_ranks():
    async def test(service, engines):
        await until(lambda: service.state == "ready")
        begun, waiting = submit(service), submit(service, 2)
        service.post(begun, piece())
        await until(lambda: stream_of(begun).num_tokens)
        assert (service.num_running, service.num_waiting) == (1, 2)
        engines[0].die()
        await until(lambda: service.state == "restarting" or len(engines) == 2)
        later = submit(service)
        await until(lambda: len(engines) == 2 and len(engines[1].taken) == 2)
        assert engines[1].taken == [waiting, later]
        with pytest.raises(ApiError, match=r"lost with the ranks that ran it .*it died") as error:
            [_ async for _ in stream_of(begun).steps()]
        assert (error.value.status, error.value.code) == (503, "rank_failed")
        assert service.num_restarts == 1

    serving(test)


class Tokenizing(FakeEngine):
    """An engine whose tokenizer takes as long as the test says: a prompt of n tokens waits for event n."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def prompt_ids(self, index, prompt):
        self.events[len(prompt)].wait(10)
        if len(prompt) == 3:
            raise ConfigurationError("prompt 0 is too long")
        return prompt


def tokenized_beside(test, gather_s=10.0):
    """Run `test(service, engine, ask)`: `ask(n)` starts a request with a prompt of n tokens, up to 3."""
    engine = Tokenizing([threading.Event() for _ in range(4)])

    async def main():
        service = Service(lambda: engine, ServeOptions("tiny"))
        service.gather_s = gather_s
        running = asyncio.ensure_future(service.run())
        await until(lambda: service.state == "ready")

        def ask(num_tokens):
            return service.start(CompletionRequest(prompt=[1] * num_tokens), b"", 1, "a")

        await test(service, engine, ask)
        running.cancel()

    asyncio.run(asyncio.wait_for(main(), 30))


async def tokenized(stream):
    """Wait until the tokenizer is through with a request."""
    await until(lambda: stream.num_prompt_tokens)


def test_requests_that_come_together_reach_the_ranks_together():
    """Each prompt that begins by itself would cost all ranks a step of its own."""

    async def test(service, engine, ask):
        engine.events[1].set()
        ask(1)
        await until(lambda: engine.batches == [1])  # it waits for nobody
        engine.events[1].clear()
        asked = [ask(1), ask(2), ask(3)]
        engine.events[1].set()
        await tokenized(asked[0])
        await asyncio.sleep(0.05)
        assert engine.batches == [1]
        engine.events[2].set()
        await tokenized(asked[1])
        engine.events[3].set()
        with pytest.raises(ApiError, match="too long"):  # a request that is refused holds nobody up
            [_ async for _ in asked[2].steps()]
        await until(lambda: engine.batches == [1, 2])
        assert service.num_waiting == 3

    tokenized_beside(test)


def test_no_request_waits_long_for_the_tokens_of_another():
    async def test(service, engine, ask):
        ask(1), ask(2)
        engine.events[1].set()
        await until(lambda: engine.batches == [1])
        engine.events[2].set()
        await until(lambda: engine.batches == [1, 1])

    tokenized_beside(test, gather_s=0.003)


def test_a_request_that_leaves_before_the_ranks_hear_of_it_never_runs():
    async def test(service, engine, ask):
        leaves, stays = ask(1), ask(2)
        engine.events[1].set()
        await tokenized(leaves)
        leaves.leave()
        engine.events[2].set()
        await until(lambda: engine.batches)
        assert [stream_of(one) for one in engine.taken] == [stays]
        assert service.num_waiting == 1 and ended(service.metrics) == {"abort": 1}

    tokenized_beside(test)


def test_a_request_that_its_ranks_die_of_is_given_up():
    async def test(service, engines):
        await until(lambda: service.state == "ready")
        poison = submit(service)
        for lives in range(1, 4):
            engines[-1].die()
            await until(lambda lives=lives: len(engines) == lives + 1)
        assert [poison in engine.taken for engine in engines] == [True, True, True, False]
        with pytest.raises(ApiError, match="may be sent again"):
            [_ async for _ in stream_of(poison).steps()]

    serving(test)


def test_ranks_that_die_again_and_again_end_the_service():
    async def test(service, engines):
        while True:
            await asyncio.sleep(0.01)
            if engines:
                engines[-1].error = LOST

    with pytest.raises(PeerFailedError, match="it died"):
        serving(test, max_restarts=2)


def test_a_finished_sequence_resets_the_count_of_losses():
    async def test(service, engines):
        for life in range(1, 5):
            await until(lambda life=life: len(engines) == life and service.state == "ready")
            generation = submit(service)
            service.post(generation, piece(finish="stop"))
            assert [len(step) async for step in stream_of(generation).steps()] == [1]
            service.leave(generation)
            engines[-1].die()

    serving(test, max_restarts=1)


def test_options_that_cannot_work_end_the_service_at_once():
    def starts():
        raise ConfigurationError("max_model_len must be >= 1")

    with pytest.raises(ConfigurationError, match="max_model_len"):
        serving(lambda service, engines: asyncio.sleep(30), starts=starts)


@pytest.mark.parametrize("error", [ConfigurationError("the checkpoint has changed"), TypeError("a fault of ours")])
def test_whoever_waits_hears_at_once_that_a_restart_cannot_work(error):
    lives, heard = [], []

    def starts():
        lives.append(None)
        if len(lives) == 2:
            raise error

    async def test(service, engines):
        await until(lambda: service.state == "ready")
        waiting = submit(service, 2)
        engines[0].die()
        with pytest.raises(ApiError) as told:
            [_ async for _ in stream_of(waiting).steps()]
        heard.append((told.value.status, told.value.code, ended(service.metrics)))
        await asyncio.sleep(30)

    with pytest.raises(type(error), match=str(error)):
        serving(test, starts=starts, grace_s=0.5)
    assert heard == [(503, "service_failed", {"error": 2})]


def test_every_sequence_is_counted_once_by_how_it_ended():
    async def test(service, engines):
        await until(lambda: service.state == "ready")
        left, lost, drained = (submit(service, count) for count in (3, 4, 5))
        for generation in (left, lost):
            service.post(generation, piece(finish="stop"))
        await until(lambda: left.num_open == 2 and lost.num_open == 3)
        service.leave(left)
        service.post(lost, LOST)
        await until(lambda: not lost.num_open)
        assert ended(service.metrics) == {"stop": 2, "abort": 2, "error": 3}
        service.give_up(LOST)
        service.post(drained, piece(finish="length"))  # that was on its way, as the loss is
        service.post(drained, LOST)
        await asyncio.sleep(0.05)
        for generation in (lost, drained):
            service.leave(generation)
        assert ended(service.metrics) == {"stop": 2, "abort": 2, "error": 8}

    serving(test)


def test_the_queue_counts_sequences_without_a_token():
    async def test(service, engines):
        await until(lambda: service.state == "ready")
        first = submit(service, 3)
        with pytest.raises(ApiError, match="3 sequences wait already, and at most 4 may") as error:
            submit(service, 2)
        assert (error.value.status, error.value.headers) == (429, {"Retry-After": "1"})
        service.post(first, piece())
        await until(lambda: stream_of(first).num_tokens)
        submit(service, 2)
        service.leave(first)
        assert engines[0].abandoned == [first]
        assert service.num_waiting == 2

    serving(test, max_queue=4)


def test_a_drain_ends_what_does_not_end_by_itself():
    async def test(service, engines):
        await until(lambda: service.state == "ready")
        generation = submit(service)
        draining = asyncio.ensure_future(service.drain(0.2))
        await asyncio.sleep(0)
        assert service.health()["status"] == "down"
        with pytest.raises(ApiError, match="draining"):
            submit(service)
        with pytest.raises(ApiError, match="draining"):
            [_ async for _ in stream_of(generation).steps()]
        assert await draining == {"error": 1}
        assert engines[0].abandoned == [generation]  # whose rows the ranks would go on with

    serving(test)


def test_tokens_of_one_step_are_one_event_and_slow_readers_get_larger_ones():
    async def test(service, _):
        await until(lambda: service.state == "ready")
        generation, steps = submit(service, 2), []
        for text in "xy":
            for index in range(2):
                service.post(generation, piece(index, text, finish="length" if text == "y" else None))
        await until(lambda: stream_of(generation).num_tokens == 4)
        async for step in stream_of(generation).steps():
            steps.append(step)
        return steps

    (step,) = serving(test)
    event = Form("tiny", is_chat=True).event(step, None, shows_usage=False)
    choices = json.loads(event.removeprefix(b"data: "))["choices"]
    assert [choice["delta"] for choice in choices] == [{"role": "assistant", "content": "xy"}] * 2
    assert [(choice["index"], choice["finish_reason"]) for choice in choices] == [(0, "length"), (1, "length")]


def test_a_step_without_text_is_no_event():
    form = Form("tiny", is_chat=False)
    assert form.event([piece(text="")], None, shows_usage=True) == b""
    assert form.event([piece(text="")], {"prompt_tokens": 1}, shows_usage=True) == b""
    assert b'"usage":null' in form.event([piece(text="")] * 2 + [piece(text="\u20ac")], None, shows_usage=True)


def test_tokens_that_are_parts_of_characters_have_names_of_their_own():
    tokenizer = byte_tokenizer()
    euro = tokenizer.encode("\u20ac")

    async def test(service, _):
        await until(lambda: service.state == "ready")
        shown = [service.token(token, -0.5) for token in euro]
        assert shown[0] == {"token": "bytes:\\xe2", "logprob": -0.5, "bytes": [0xE2]}
        assert [token["token"] for token in shown[1:]] == ["bytes:\\x82", "bytes:\\xac"]
        assert service.token(tokenizer.eos_token_id, -1.0)["token"] == "<|eos|>"
        assert service.token(10**6, float("-inf")) == {"token": "", "logprob": -9999.0, "bytes": []}
        return shown

    first, second, third = serving(test)
    pieces = [piece(text="", tokens=[first, second, third]), piece(text="\u20ac", tokens=[second, third])]
    choice = Form("tiny", is_chat=False).document(pieces, {})["choices"][0]["logprobs"]
    assert choice["top_logprobs"][0] == {"bytes:\\xe2": -0.5, "bytes:\\x82": -0.5, "bytes:\\xac": -0.5}
    assert choice["text_offset"] == [0, 0]


@pytest.mark.parametrize("error", [None, ConfigurationError("the checkpoint has changed")])
def test_signal_handlers_are_those_of_before_however_the_server_ends(error):
    """And the engine is closed."""
    numbers, said = (signal.SIGINT, signal.SIGTERM), []
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    ours = [signal.getsignal(number) for number in numbers]
    engine = FakeEngine()

    def start():
        if error is not None:
            raise error
        return engine

    async def interrupt(service):
        await until(lambda: service.state == "ready")
        os.kill(os.getpid(), signal.SIGINT)

    async def main():
        with open_socket("127.0.0.1", 0) as listener:
            await serve(start, ServeOptions("tiny"), listener, interrupt, said.append, os._exit)

    try:
        if error is None:
            asyncio.run(main())
            assert engine.is_closed and said == [
                "draining: running 0, waiting 0; at most 30 s (Ctrl-C again ends at once)",
                "drained: answered 0, cut off 0",
            ]
        else:
            with pytest.raises(ConfigurationError, match="has changed"):
                asyncio.run(main())
        assert [signal.getsignal(number) for number in numbers] == ours
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
