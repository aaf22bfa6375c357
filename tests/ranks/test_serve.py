"""What clients of `lockstep serve` get, by the real `openai` package, over three uneven ranks."""

import concurrent.futures
import contextlib
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import GREEDY, KEY, SLOW, Server, texts_of_one_process

from lockstep.models.tiny import make_tiny

RANKS = 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("serve") / "tiny", num_layers=2, num_experts=12))


@pytest.fixture(scope="module")
def server(tiny):
    made = Server(tiny, ranks=RANKS)
    yield made
    made.process.kill()


@pytest.fixture(scope="module")
def client(server):
    return server.client


@pytest.fixture(scope="module")
def alone(tiny):
    return texts_of_one_process(tiny)


@pytest.mark.ranks(RANKS)
def test_a_completion_is_that_of_one_process(client, alone):
    answer = client.completions.create(prompt="once upon", max_tokens=12, **GREEDY)
    assert answer.choices[0].text == alone("once upon", 12)
    assert (answer.choices[0].finish_reason, answer.object, answer.model) == ("length", "text_completion", "tiny")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (9, 12, 21)


@pytest.mark.ranks(RANKS)
def test_a_stream_has_the_same_text_and_its_usage_at_the_end(client, alone):
    options = {"include_usage": True}
    events = list(
        client.completions.create(prompt="hello", max_tokens=20, stream=True, stream_options=options, **GREEDY)
    )
    text = "".join(choice.text for event in events for choice in event.choices)
    assert text == alone("hello", 20)
    assert [event.usage for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == 20
    assert events[-2].choices[0].finish_reason == "length" and len({event.id for event in events}) == 1


@pytest.mark.ranks(RANKS)
def test_a_chat_goes_through_the_chat_template(client, alone):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    expected = alone("system: Be brief.\nuser: Hi\nassistant:", 16)
    answer = client.chat.completions.create(messages=messages, max_completion_tokens=16, **GREEDY)
    assert answer.choices[0].message.content == expected
    assert (answer.choices[0].message.role, answer.object) == ("assistant", "chat.completion")
    events = list(client.chat.completions.create(messages=messages, max_tokens=16, stream=True, **GREEDY))
    assert "".join(event.choices[0].delta.content for event in events) == expected
    first, *others = (event.choices[0].delta.role for event in events)
    assert first == "assistant" and set(others) <= {None}  # the tokens of several steps may be one event


@pytest.mark.ranks(RANKS)
def test_forty_requests_at_once_are_those_of_one_process(server, client, alone):
    """Prompts and outputs of very uneven lengths, over ranks of which some idle at times."""
    prompts = [[(7 * index + 3 * place) % 256 for place in range(1 + (13 * index) % 90)] for index in range(40)]
    counts = [1 + (11 * index) % 30 for index in range(40)]

    def ask(index):
        if index % 2:
            events = client.completions.create(prompt=prompts[index], max_tokens=counts[index], stream=True, **GREEDY)
            return "".join(event.choices[0].text for event in events)
        return client.completions.create(prompt=prompts[index], max_tokens=counts[index], **GREEDY).choices[0].text

    before = server.figure("vllm:generation_tokens_total")
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        texts = list(pool.map(ask, range(40)))
    assert texts == [alone(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    assert server.figure("vllm:generation_tokens_total") - before == sum(counts)
    assert server.figure("vllm:num_requests_running") == server.figure("vllm:num_requests_waiting") == 0


@pytest.mark.ranks(RANKS)
def test_several_prompts_and_choices_in_one_request(client, alone):
    answer = client.completions.create(prompt=["ab", "xyz"], n=2, max_tokens=6, **GREEDY)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [alone("ab", 6)] * 2 + [alone("xyz", 6)] * 2
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 24)


@pytest.mark.ranks(RANKS)
def test_a_seed_repeats_and_each_choice_has_random_numbers_of_its_own(client):
    def ask(seed):
        options = {"seed": seed, "n": 3, "max_tokens": 12, "temperature": 1.0}
        return [c.text for c in client.completions.create(model="tiny", prompt="abc", **options).choices]

    assert ask(5) == ask(5) != ask(6)
    assert len(set(ask(5))) == 3


@pytest.mark.ranks(RANKS)
def test_a_stop_string_ends_the_text_before_it(client, alone):
    full = alone("stop here", 30)
    stop = full[10:12]
    cut = full[: full.index(stop)]
    answer = client.completions.create(prompt="stop here", max_tokens=30, stop=[stop], **GREEDY).choices[0]
    assert (answer.text, answer.finish_reason) == (cut, "stop")
    events = client.completions.create(prompt="stop here", max_tokens=30, stop=stop, stream=True, **GREEDY)
    assert "".join(event.choices[0].text for event in events) == cut


@pytest.mark.ranks(RANKS)
def test_logprobs_of_both_kinds(client):
    answer = client.completions.create(prompt="abc", max_tokens=4, logprobs=3, **GREEDY).choices[0].logprobs
    assert len(answer.tokens) == len(answer.token_logprobs) == len(answer.text_offset) == 4
    assert all(
        len(top) == 3 and value == max(top.values())
        for value, top in zip(answer.token_logprobs, answer.top_logprobs, strict=True)
    )
    whole = client.completions.create(prompt="abc", max_tokens=20, logprobs=0, **GREEDY).choices[0]
    expected = whole.logprobs.text_offset
    assert expected[0] == 0 and expected == sorted(expected) and len(expected) == 20
    for place in range(0, len(whole.text), 4):  # held back until the end
        options = {"prompt": "abc", "max_tokens": 20, "logprobs": 0, "stop": whole.text[place:] + "\0"} | GREEDY
        held = client.completions.create(**options).choices[0]
        events = client.completions.create(stream=True, **options)
        streamed = [offset for event in events for offset in event.choices[0].logprobs.text_offset]
        assert held.text == whole.text and held.logprobs.text_offset == streamed == expected
    messages = [{"role": "user", "content": "abc"}]
    chat = client.chat.completions.create(messages=messages, max_tokens=4, logprobs=True, top_logprobs=5, **GREEDY)
    content = chat.choices[0].logprobs.content
    assert len(content) == 4 and all(len(token.top_logprobs) == 5 for token in content)
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in content)
    text = b"".join(bytes(token.bytes) for token in content).decode(errors="replace")
    assert text == chat.choices[0].message.content
    events = client.chat.completions.create(
        messages=messages, max_tokens=4, logprobs=True, top_logprobs=5, stream=True, **GREEDY
    )
    streamed = [token for event in events for token in (event.choices[0].logprobs.content)]
    assert [token.logprob for token in streamed] == [token.logprob for token in content]


@pytest.mark.ranks(RANKS)
def test_ignore_eos_min_tokens_and_the_room_that_is_left(client, server):
    """With every byte as likely a stop as not, `min_tokens` decides when it ends."""
    extra = {"stop_token_ids": list(range(256)), "min_tokens": 7}
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=30, extra_body=extra)
    assert answer.usage.completion_tokens == 7 or answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens >= 7
    status, document, _ = server.post({"prompt": [1] * 40000, "max_tokens": 1})
    assert (status, document["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.ranks(RANKS)
def test_usage_in_every_event_where_it_is_asked_for(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = list(client.completions.create(prompt="abc", max_tokens=9, stream=True, stream_options=options, **GREEDY))
    counts = [event.usage.completion_tokens for event in events]
    assert counts == sorted(counts) and counts[-1] == 9 and all(event.usage.prompt_tokens == 3 for event in events)
    assert all(event.choices for event in events[:-1])
    # Held back as a whole, the text comes with the last token. Without `include_usage`, no event tells any usage.
    text = "".join(choice.text for event in events for choice in event.choices)
    options = {"continuous_usage_stats": True}
    events = client.completions.create(
        prompt="abc", max_tokens=9, stream=True, stream_options=options, stop=text + "\0", **GREEDY
    )
    assert [(event.choices[0].text, event.usage) for event in events] == [(text, None)]


@pytest.mark.ranks(RANKS)
def test_the_models_and_what_is_not_served(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert server.post({"prompt": "a"}, "/v1/embeddings")[0] == 404
    assert server.post({"prompt": "a"}, "/health")[0] == 405


@pytest.mark.ranks(RANKS)
def test_the_lines_of_the_readme_work(server, tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "OpenAI(" in block]
    (command,) = re.findall(r"^curl -N localhost:8000.*$", readme, re.MULTILINE)
    here = code.replace("localhost:8000", f"127.0.0.1:{server.port}").replace('"none"', repr(KEY))
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(here, {})
    assert shown.getvalue().strip()
    if shutil.which("curl"):
        command = (
            command.replace("localhost:8000", f"127.0.0.1:{server.port}") + f" -s -H 'Authorization: Bearer {KEY}'"
        )
        answer = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=SLOW, check=True).stdout
        assert answer.startswith('data: {"id":"chatcmpl-') and answer.endswith("data: [DONE]\n\n")
