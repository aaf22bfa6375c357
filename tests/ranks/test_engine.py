"""`lockstep.Engine` over processes that it starts: equal tokens to one process, whatever else runs; and how it ends.

A start takes seconds, so that two engines serve most tests, and the last test of each ends it by force.
"""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from one_process import in_order, one_process, tokens_of

from waiting import is_running, wait_for

pytest.importorskip("transformers")


from lockstep import ConfigurationError, Engine, PeerFailedError, RankAbsentError, SamplingParams
from lockstep.models.tiny import byte_tokenizer, make_tiny
from lockstep.workload import PAGE_SIZE

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=30_000, temperature=0, ignore_eos=True)
PAGES = 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("engine") / "tiny", num_layers=2))


@pytest.fixture(scope="module")
def alone(tiny):
    return one_process(tiny)


@pytest.fixture(scope="module")
def engine(tiny):
    """Two ranks with few pages; the last test of this file that uses it kills one."""
    made = Engine(tiny, data_parallel_size=2, kv_capacity_tokens=PAGES * PAGE_SIZE, max_num_seqs=8, deadline_s=20)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared(tiny):
    """Two ranks that share their requests; the last test of this file that uses it stops one."""
    made = Engine(tiny, tensor_parallel_size=2, deadline_s=2)
    yield made
    made.close()


def workers(engine):
    return [rank.pid for rank in engine.ranks()]


@contextlib.contextmanager
def stopped(engine):
    """The ranks stand still, and find all that is sent meanwhile in one step."""
    for pid in workers(engine):
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in workers(engine):
        os.kill(pid, signal.SIGCONT)


def prompts_of(lengths):
    return [[(7 * index + 3 * place) % 256 for place in range(length)] for index, length in enumerate(lengths)]


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "lengths", [(5,), (1, 30, 2, 70, 9), (40, 3, 3, 3)], ids=["a rank idles", "uneven", "one long"]
)
def test_greedy_tokens_are_those_of_one_process(engine, alone, lengths):
    prompts = prompts_of(lengths)
    outputs = list(engine.generate(prompts, GREEDY))
    assert tokens_of(outputs) == [alone(prompt, 12) for prompt in prompts]
    assert len({output.rank for output in outputs}) == min(2, len(lengths))


class Heard:
    """What a listener hears: token ids by prompt, and the end."""

    def __init__(self):
        self.tokens, self.ended, self.error = {}, threading.Semaphore(0), None

    def on_token(self, entry, delta):
        self.tokens[entry.index] = tuple(entry.checker.token_ids)
        if delta.finish_reason is not None:
            self.ended.release()

    def on_error(self, error):
        self.error = error
        self.ended.release()


@pytest.mark.ranks(2)
def test_a_listener_hears_every_token_and_ranks_say_how_they_are(engine, alone):
    prompts, heard, before = prompts_of((5, 9)), Heard(), engine.stats.longest_rows
    engine.submit(heard, engine.read_requests(prompts, GREEDY))
    for _ in prompts:
        assert heard.ended.acquire(timeout=30)
    engine.forget(heard)
    assert [heard.tokens[index] for index in range(2)] == [alone(prompt, 12) for prompt in prompts]
    assert [rank.state for rank in engine.ranks()] == ["alive"] * 2
    time.sleep(1.5)
    wait_for(lambda: max(rank.silent_s for rank in engine.ranks()) < 1)  # idle ranks say that they live
    stats = engine.stats
    assert stats.longest_rows - before >= 9 + 11  # the longer prompt, and tokens
    assert 0 <= stats.idle_share < 1 and sum(stats.rows) > stats.longest_rows > 0 and min(stats.agreement_s) > 0


@pytest.mark.ranks(2)
def test_what_a_listener_has_abandoned_leaves_its_rank(shared):
    heard, overrun = Heard(), sum(shared.stats.overrun_rows)
    shared.submit(heard, shared.read_requests(prompts_of((4,)), ENDLESS))
    wait_for(lambda: heard.tokens)
    shared.abandon(heard)
    wait_for(lambda: shared.stats.unfinished_requests == 0)
    wait_for(lambda: max(shared.stats.num_kv_tokens) == 0)
    assert len(heard.tokens[0]) < ENDLESS.max_tokens
    assert sum(shared.stats.overrun_rows) - overrun <= 3


@pytest.mark.ranks(2)
def test_texts_and_ids_are_prompts_alike(engine, alone):
    text, ids = "some text, ä€😀", byte_tokenizer()("some text, ä€😀")["input_ids"]
    outputs = in_order(engine.generate([text, ids, torch.tensor(ids)], GREEDY))
    assert tokens_of(outputs) == [alone(ids, 12)] * 3
    assert outputs[0].text == byte_tokenizer().decode(outputs[0].token_ids, skip_special_tokens=True)


@pytest.mark.ranks(2)
def test_every_request_has_its_own_parameters(engine, alone):
    prompts = prompts_of((4, 4, 6, 3))
    full = alone(prompts[1], 12)
    params = [
        SamplingParams(max_tokens=3, temperature=0),
        SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[full[5]], ignore_eos=True),
        SamplingParams(max_tokens=5, temperature=1, seed=3),
        SamplingParams(max_tokens=4, temperature=0, logprobs=3),
    ]
    outputs = in_order(engine.generate(prompts, params))
    assert [len(output.token_ids) for output in outputs] == [3, full.index(full[5]) + 1, 5, 4]
    assert outputs[1].stop_reason == full[5] and outputs[1].finish_reason == "stop"
    assert [output.logprobs is None for output in outputs] == [True, True, True, False]
    for token, entry in zip(outputs[3].token_ids, outputs[3].logprobs, strict=True):
        assert len(entry.top) == 3 and entry.top[0] == (token, entry.logprob)  # greedy takes the most likely one
        assert 0 >= entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1]


@pytest.mark.ranks(2)
def test_a_seed_repeats_whatever_runs_beside_it(engine):
    seeded = SamplingParams(max_tokens=16, temperature=1, seed=11, ignore_eos=True)
    (first,) = engine.generate([[1, 2, 3]], seeded)
    beside = in_order(engine.generate([[9] * 40, [1, 2, 3], [5]], [LONG, seeded, GREEDY]))
    assert beside[1].token_ids == first.token_ids
    (other,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=16, temperature=1, seed=12, ignore_eos=True))
    assert other.token_ids != first.token_ids


@pytest.mark.ranks(2)
def test_stop_strings_cut_the_text_exactly_and_cost_one_row(engine, alone):
    prompts, tokenizer = prompts_of((4, 9, 2, 17)), byte_tokenizer()
    texts = [tokenizer.decode(alone(prompt, 60), skip_special_tokens=True) for prompt in prompts]
    stops = []
    for text in texts:  # two characters in a row that are whole tokens, somewhere in the text
        pairs = (text[start : start + 2] for start in range(3, 50))
        stops.append(next(pair for pair in pairs if pair.isascii() and pair.isprintable()))
    before, dropped = sum(engine.stats.overrun_rows), engine.stats.dropped_tokens
    params = [SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, stop=stop) for stop in stops]
    outputs = in_order(engine.generate(prompts, params))
    for output, text, stop in zip(outputs, texts, stops, strict=True):
        assert output.text == text[: text.index(stop)]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    list(engine.generate([[1]], GREEDY))  # by whose end the overrun rows have been told
    assert 1 <= sum(engine.stats.overrun_rows) - before <= len(prompts)
    assert engine.stats.dropped_tokens == dropped  # its rank has found each stop string by itself


@pytest.mark.ranks(2)
def test_what_nobody_waits_for_frees_its_pages(engine, alone):
    prompts = [[3], [1] * 50, [2] * 50]  # one of the long ones on each rank; both need all pages there
    outputs = engine.generate(prompts, [GREEDY, LONG, LONG])
    assert next(outputs).index == 0
    outputs.close()
    assert list(outputs) == []
    for output in engine.generate(prompts, [GREEDY, GREEDY, LONG]):  # let go of in the middle
        assert output.token_ids == alone(prompts[output.index], 12)
        break
    del output
    wait_for(lambda: engine.stats.unfinished_requests == 0)
    assert tokens_of(engine.generate(prompts[1:], LONG)) == [alone(prompt, 200) for prompt in prompts[1:]]


@pytest.mark.ranks(2)
def test_several_calls_at_once(engine, alone):
    first, second = engine.generate([[1, 2], [3]], GREEDY), engine.generate([[4], [5]], GREEDY)
    mixed = [next(second), next(first), next(first), next(second)]
    assert tokens_of(mixed[1:3]) == [alone([1, 2], 12), alone([3], 12)]
    assert tokens_of([mixed[0], mixed[3]]) == [alone([4], 12), alone([5], 12)]
    results = {}

    def call(number):
        results[number] = tokens_of(engine.generate([[number], [number, number]], GREEDY))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(10, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {n: [alone([n], 12), alone([n, n], 12)] for n in range(10, 14)}


@pytest.mark.ranks(2)
def test_preempted_requests_give_the_same_tokens(engine, alone):
    prompts = prompts_of([60] * 8)  # four on each rank, with four pages: every one grows into a second page
    before = sum(engine.stats.preempted)
    with stopped(engine):  # so that none ends before the last has come
        outputs = engine.generate(prompts, GREEDY)
        wait_for(lambda: engine.stats.unfinished_requests == len(prompts))
    assert tokens_of(outputs) == [alone(prompt, 12) for prompt in prompts]
    assert sum(engine.stats.preempted) > before


@pytest.mark.ranks(2)
def test_no_prompts_give_no_outputs(engine):
    assert list(engine.generate([])) == []


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("prompts", "params", "said"),
    [
        ("abc", None, "prompts must be a list .* got one string"),
        (5, None, "prompts must be a list .* got int"),
        ({"a": 1}, None, "prompts must be a list .* got dict"),
        ([1, 2], None, "prompt 0 must be a text or a list of token ids, got int 1"),
        (["a", None], None, "prompt 1 must be a text or a list of token ids, got NoneType"),
        (["a", b"b"], None, "prompt 1 must be a text or a list of token ids, got bytes"),
        (["a", ["b"]], None, "prompt 1 must hold integers, got 'b'"),
        ([[1.5]], None, "prompt 0 must hold integers, got 1.5"),
        ([[1], [True]], None, "prompt 1 must hold integers, got True"),
        (["a", ""], None, "prompt 1 has no tokens"),
        (["a", []], None, "prompt 1 has no tokens"),
        (["a", "b" * 500_000], None, "prompt 1 has 500000 characters, more than the 229376 that the context of 32768"),
        (["a", "b\ud800"], None, "prompt 1 is not a valid text"),
        ([[0], [1, 259]], None, "prompt 1 has token 259, but the model's embedding has 259 entries"),
        ([[0], [-1]], None, "prompt 1 has token -1"),
        ([[0], [0] * 40_000], None, "prompt 1 has 40000 tokens and max_tokens is 16, .* the context of 32768"),
        ([[0], [0] * 250], None, "prompt 1 has 250 tokens and max_tokens is 16, .* the 4 pages of 64 tokens"),
        (["a", "b"], [GREEDY], "2 prompts, but 1 sampling_params"),
        (["a"], [GREEDY, GREEDY], "1 prompts, but 2 sampling_params"),
        (["a"], {"max_tokens": 3}, "sampling_params must be a SamplingParams or a list of them, got dict"),
        (["a", "b"], [GREEDY, None], "sampling_params of prompt 1 must be a SamplingParams, got NoneType"),
        (["a"], SamplingParams(stop_token_ids=[259]), "prompt 0 has token 259 in stop_token_ids"),
    ],
)
def test_bad_prompts_are_named_before_anything_runs(engine, prompts, params, said):
    steps = engine.stats.steps
    with pytest.raises(ConfigurationError, match=said):
        engine.generate(prompts, params)
    assert engine.stats.steps == steps and engine.stats.unfinished_requests == 0


def test_bad_options_are_named_before_any_rank_starts(tiny, tmp_path):
    for options, said in (
        ({"data_paralel_size": 2}, "no option 'data_paralel_size'; did you mean 'data_parallel_size'"),
        ({"max_seqs": 2}, "no option 'max_seqs'; did you mean 'max_num_seqs'"),
        ({"zzz": 2}, "no option 'zzz': it has data_parallel_size, tensor"),
        ({"data_parallel_size": "2"}, "data_parallel_size must be"),
        ({"data_parallel_size": 0}, "data_parallel_size must be >= 1, got 0"),
        ({"data_parallel_size": True}, "data_parallel_size must be"),
        ({"num_redundant_experts": 2}, "num_redundant_experts needs a placement"),
        ({"placement": "/nowhere"}, "no expert load at /nowhere: No such file or directory"),
        ({"dispatcher": "fast"}, "dispatcher must be one of .* got 'fast'"),
        ({"dtype": "int8"}, "dtype must be one of .* got 'int8'"),
        ({"load_balancing": "x"}, "load_balancing must be one of"),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization must be a number in \(0, 1\], got 1.5"),
        ({"deadline_s": float("nan")}, "deadline_s must be a number > 0, got nan"),
        ({"deadline_s": "soon"}, "deadline_s must be a number > 0, got 'soon'"),
        ({"kv_capacity_tokens": 3}, "kv_capacity_tokens must be >= 64"),
        ({"survive": -1}, "survive must be >= 0, got -1"),
        ({"survive": 1}, "survive is 1 with data_parallel_size 1, .* one rank must remain"),
        ({"data_parallel_size": 3, "survive": 3}, "survive is 3 with data_parallel_size 3"),
        ({"data_parallel_size": 2, "tensor_parallel_size": 2, "survive": 1}, "share requests cannot be lost"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            Engine(tiny, **options)
    (tmp_path / "config.json").write_text("{")
    for model, said in (
        (str(tmp_path / "none"), "no checkpoint at .*none"),
        (str(tmp_path), "is not JSON"),
        (5, "model must be a checkpoint's folder or Hub id, got int"),
        ("nobody/no-such-model", "configuration of nobody/no-such-model cannot be read"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            Engine(model)


@pytest.mark.ranks(2)
def test_everything_listens_on_loopback_only(engine):
    pids, listening = {os.getpid(), *workers(engine)}, []
    for pid in pids:
        inodes = {os.readlink(path)[8:-1] for path in Path(f"/proc/{pid}/fd").iterdir() if _is_socket(path)}
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    listening.append(fields[1].split(":")[0])
    assert listening  # the store, and gloo's
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert set(listening) <= loopback


def _is_socket(path):
    try:
        return os.readlink(path).startswith("socket:")
    except OSError:
        return False


@pytest.mark.ranks(2)
def test_an_idle_engine_hardly_runs_and_answers_at_once(engine):
    processes = [psutil.Process(pid) for pid in workers(engine)]
    list(engine.generate([[1]], GREEDY))
    time.sleep(0.5)
    before = [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(2.0)
    spent = [sum(process.cpu_times()[:2]) - start for process, start in zip(processes, before, strict=True)]
    assert max(spent) < 0.2  # of 2 s


@pytest.mark.ranks(2)
def test_the_last_rank_that_is_killed_is_named_and_nothing_is_left(engine):
    pids = workers(engine)
    outputs = engine.generate([[1] * 20] * 200, LONG)  # one at a time on each rank: minutes
    wait_for(lambda: any(engine.stats.num_tokens_across_dp))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(PeerFailedError, match=r"rank [01] failed: .*SIGKILL") as caught:
        list(outputs)
    assert time.monotonic() - killed < 20, "the deadline ended the wait, not the death"
    assert caught.value.rank in (0, 1)
    wait_for(lambda: not any(is_running(pid) for pid in pids))
    with pytest.raises(PeerFailedError, match=r"rank [01] failed"):  # it stays closed, and says why
        engine.generate(["a"])
    engine.close()
    engine.close()


@pytest.mark.ranks(2)
def test_ranks_that_share_requests(shared, alone):
    prompts = prompts_of((5, 30, 2))
    outputs = list(shared.generate(prompts, GREEDY))
    assert tokens_of(outputs) == [alone(prompt, 12) for prompt in prompts]
    assert {output.rank for output in outputs} == {0}
    text = byte_tokenizer().decode(alone(prompts[0], 60), skip_special_tokens=True)
    stop = next(text[at : at + 2] for at in range(3, 50) if text[at : at + 2].isascii())
    abandoned = shared.generate(prompts, LONG)
    (output,) = shared.generate(prompts[:1], SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, stop=stop))
    assert output.text == text[: text.index(stop)]
    abandoned.close()
    assert tokens_of(shared.generate(prompts, GREEDY)) == [alone(prompt, 12) for prompt in prompts]


@pytest.mark.ranks(2)
def test_a_stopped_rank_is_named_after_the_deadline(shared):
    pids = workers(shared)
    os.kill(pids[1], signal.SIGSTOP)
    with pytest.raises(RankAbsentError, match="rank 1"):
        list(shared.generate([[1, 2, 3]], LONG))
    wait_for(lambda: not any(is_running(pid) for pid in pids))


@pytest.mark.ranks(1)
def test_a_rank_that_cannot_load_says_why(tmp_path):
    make_tiny(tmp_path, num_layers=1)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigurationError, match=r"model\.safetensors"):
        Engine(str(tmp_path))
