"""The service without ranks: what becomes of requests when engines are lost, and how tokens become events."""

import asyncio
import json
import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("starlette")

from lockstep.engine.sampling_params import SamplingParams
from lockstep.engine.stopping import TokenLogprobs
from lockstep.errors import ConfigurationError, PeerFailedError
from lockstep.models.tiny import byte_tokenizer
from lockstep.runner.front import NewRequest
from lockstep.serve.answers import Form, Piece, TokenTexts
from lockstep.serve.errors import ApiError
from lockstep.serve.metrics import ServiceMetrics
from lockstep.serve.service import Service

LOST = PeerFailedError("rank 1 failed: it died", 1, "it died")


class FakeEngine:
    """Takes requests, and does what the test says."""

    def __init__(self):
        self.error, self.taken, self.abandoned, self.tokenizer = None, [], [], byte_tokenizer()

    def submit(self, listener, requests):
        self.taken.append(listener)
        if self.error is not None:
            listener.on_error(self.error)

    def abandon(self, listener):
        self.abandoned.append(listener)

    def forget(self, listener):
        pass

    def close(self):
        pass

    def die(self):
        self.error = LOST
        for listener in self.taken:
            listener.on_error(LOST)


def requests(count=1):
    return [NewRequest(index, [1, 2], SamplingParams()) for index in range(count)]


def serving(test, max_queue=16, max_restarts=5, starts=None, grace_s=0.0):
    """Run `test(service, engines)` beside a service whose engines it can kill, and `grace_s` longer."""
    engines = []

    def start():
        if starts is not None:
            starts()
        engines.append(FakeEngine())
        return engines[-1]

    async def main():
        service = Service(start, ServiceMetrics("tiny"), max_queue, max_restarts)
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
    found = re.findall(r'vllm:request_success_total\{finished_reason="(\w+)".*\} (\d+)', metrics.text().decode())
    return {reason: int(count) for reason, count in found}


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def piece(index=0, text="a", finish=None, logprobs=None, token=64):
    return Piece(index, token, text, logprobs, finish)


def test_what_waits_is_kept_and_what_has_begun_is_lost_with_its_ranks():
    async def test(service, engines):
        await until(lambda: service.state == "ready")
        begun, waiting = service.submit(requests()), service.submit(requests(2))
        service._post(begun, piece())
        await until(lambda: begun.num_tokens)
        assert (service.num_running, service.num_waiting) == (1, 2)
        engines[0].die()
        await until(lambda: service.state == "restarting" or len(engines) == 2)
        later = service.submit(requests())
        await until(lambda: len(engines) == 2 and len(engines[1].taken) == 2)
        assert engines[1].taken == [waiting, later]
        with pytest.raises(ApiError, match=r"lost with the ranks that ran it .*it died") as error:
            [_ async for _ in begun.steps()]
        assert (error.value.status, error.value.code) == (503, "rank_failed")
        assert service.num_restarts == 1

    serving(test)


def test_a_request_that_its_ranks_die_of_is_given_up():
    async def test(service, engines):
        await until(lambda: service.state == "ready")
        poison = service.submit(requests())
        for lives in range(1, 4):
            engines[-1].die()
            await until(lambda lives=lives: len(engines) == lives + 1)
        assert [poison in engine.taken for engine in engines] == [True, True, True, False]
        with pytest.raises(ApiError, match="may be sent again"):
            [_ async for _ in poison.steps()]

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
            generation = service.submit(requests())
            service._post(generation, piece(finish="stop"))
            assert [len(step) async for step in generation.steps()] == [1]
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
        waiting = service.submit(requests(2))
        engines[0].die()
        with pytest.raises(ApiError) as told:
            [_ async for _ in waiting.steps()]
        heard.append((told.value.status, told.value.code, ended(service.metrics)))
        await asyncio.sleep(30)

    with pytest.raises(type(error), match=str(error)):
        serving(test, starts=starts, grace_s=0.5)
    assert heard == [(503, "service_failed", {"error": 2})]


def test_every_sequence_is_counted_once_by_how_it_ended():
    async def test(service, engines):
        await until(lambda: service.state == "ready")
        left, lost, drained = (service.submit(requests(count)) for count in (3, 4, 5))
        for generation in (left, lost):
            service._post(generation, piece(finish="stop"))
        await until(lambda: left.num_open == 2 and lost.num_open == 3)
        service.leave(left)
        service._post(lost, LOST)
        await until(lambda: not lost.num_open)
        assert ended(service.metrics) == {"stop": 2, "abort": 2, "error": 3}
        service._fail_all()
        service._post(drained, piece(finish="length"))  # that was on its way, as the loss is
        service._post(drained, LOST)
        await asyncio.sleep(0.05)
        for generation in (lost, drained):
            service.leave(generation)
        assert ended(service.metrics) == {"stop": 2, "abort": 2, "error": 8}

    serving(test)


def test_the_queue_counts_sequences_without_a_token():
    async def test(service, engines):
        await until(lambda: service.state == "ready")
        first = service.submit(requests(3))
        with pytest.raises(ApiError, match="3 sequences wait already, and at most 4 may") as error:
            service.submit(requests(2))
        assert (error.value.status, error.value.headers) == (429, {"Retry-After": "1"})
        service._post(first, piece())
        await until(lambda: first.num_tokens)
        service.submit(requests(2))
        service.leave(first)
        assert engines[0].abandoned == [first]
        assert service.num_waiting == 2

    serving(test, max_queue=4)


def test_a_drain_ends_what_does_not_end_by_itself():
    async def test(service, engines):
        await until(lambda: service.state == "ready")
        generation = service.submit(requests())
        draining = asyncio.ensure_future(service.drain(0.2))
        await asyncio.sleep(0)
        assert service.health()["status"] == "down"
        with pytest.raises(ApiError, match="draining"):
            service.submit(requests())
        with pytest.raises(ApiError, match="draining"):
            [_ async for _ in generation.steps()]
        await draining

    serving(test)


def test_tokens_of_one_step_are_one_event_and_slow_readers_get_larger_ones():
    async def test(service, _):
        await until(lambda: service.state == "ready")
        generation, steps = service.submit(requests(2)), []
        for text in "xy":
            for index in range(2):
                service._post(generation, piece(index, text, finish="length" if text == "y" else None))
        await until(lambda: generation.num_tokens == 4)
        async for step in generation.steps():
            steps.append(step)
        return steps

    (step,) = serving(test)
    event = Form("tiny", TokenTexts(None), is_chat=True).event(step, None, shows_usage=False)
    choices = json.loads(event.removeprefix(b"data: "))["choices"]
    assert [choice["delta"] for choice in choices] == [{"role": "assistant", "content": "xy"}] * 2
    assert [(choice["index"], choice["finish_reason"]) for choice in choices] == [(0, "length"), (1, "length")]


def test_a_step_without_text_is_no_event():
    form = Form("tiny", TokenTexts(None), is_chat=False)
    assert form.event([piece(text="")], None, shows_usage=True) == b""
    assert b'"usage":null' in form.event([piece(text="")] * 2 + [piece(text="\u20ac")], None, shows_usage=True)


def test_tokens_that_are_parts_of_characters_have_names_of_their_own():
    tokenizer = byte_tokenizer()
    texts, euro = TokenTexts(tokenizer), tokenizer.encode("\u20ac")
    assert [texts.of(token) for token in euro] == [
        ("bytes:\\xe2", b"\xe2"),
        ("bytes:\\x82", b"\x82"),
        ("bytes:\\xac", b"\xac"),
    ]
    assert texts.of(tokenizer.eos_token_id)[0] == "<|eos|>" and texts.of(10**6) == ("", b"")
    logprobs = TokenLogprobs(-0.5, ((euro[1], float("-inf")), (euro[2], -1.0)))
    pieces = [piece(text="", token=euro[0], logprobs=logprobs), piece(text="\u20ac", token=euro[1], logprobs=logprobs)]
    form = Form("tiny", texts, is_chat=False)
    choice = form.document(pieces, {})["choices"][0]["logprobs"]
    assert choice["top_logprobs"][0] == {"bytes:\\xe2": -0.5, "bytes:\\x82": -9999.0, "bytes:\\xac": -1.0}
    assert choice["text_offset"] == [0, 0]
