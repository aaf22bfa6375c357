"""`lockstep serve` from its start to its end: clients that go away, ranks that die, signals, and its log."""

import concurrent.futures
import json
import os
import shutil
import signal
import socket

import psutil
import pytest
from serving import ENDLESS, GREEDY, Server, endless, head, openai, texts_of_one_process, wait_for

from lockstep.models.tiny import make_tiny

RANKS = 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("serve") / "tiny", num_layers=2, num_experts=12))


@pytest.fixture(scope="module")
def server(tiny):
    made = Server(tiny, "--log-requests", "sizes", ranks=RANKS)
    yield made
    made.process.kill()


@pytest.fixture(scope="module")
def client(server):
    return server.client


@pytest.fixture(scope="module")
def alone(tiny):
    return texts_of_one_process(tiny)


@pytest.mark.ranks(RANKS)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows(server, stream):
    overrun, tokens = server.figure("lockstep_overrun_rows_total"), server.figure("vllm:generation_tokens_total")
    with endless(server, stream=stream):
        wait_for(lambda: server.figure("vllm:generation_tokens_total") > tokens + 3)
    wait_for(lambda: server.figure("vllm:num_requests_running") == 0)
    wait_for(lambda: server.figure("lockstep_step_rows") == 0)
    assert server.figure("vllm:generation_tokens_total") - tokens < ENDLESS
    assert server.figure("lockstep_overrun_rows_total") - overrun <= 3


@pytest.mark.ranks(RANKS)
def test_health_and_figures(server):
    assert server.post({"prompt": "a", "max_tokens": 2})[0] == 200
    status, text = server.get("/health")
    health = json.loads(text)
    assert (status, health["status"]) == (200, "ready")
    assert [(rank["rank"], rank["state"]) for rank in health["ranks"]] == [(rank, "alive") for rank in range(RANKS)]
    assert server.figure("lockstep_up") == 1 and server.figure("lockstep_steps_total") > 0
    assert 0 <= server.figure("lockstep_idle_share") < 1
    assert server.figure("vllm:time_to_first_token_seconds_count") > 0


@pytest.mark.ranks(RANKS)
def test_prompts_are_not_in_the_log(server, client):
    client.completions.create(model="tiny", prompt="a secret phrase", max_tokens=2)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="a secret phrase", max_tokens=10**6)
    wait_for(lambda: any("15 prompt tokens" in line for line in server.lines))
    log = "".join(server.lines)
    assert "secret" not in log and "97, 32" not in log and "Traceback" not in log


@pytest.mark.ranks(RANKS)
def test_a_dead_rank_costs_no_request_and_dead_ranks_keep_what_waits(server, client, alone):
    """The others go on. With the last of them health tells of it at once, and a request that comes then is answered."""
    victims = server.ranks()
    stream = client.completions.create(prompt="abc", max_tokens=300, stream=True, **GREEDY)
    events = [next(stream)]
    victims[1].kill()
    events += list(stream)
    assert "".join(event.choices[0].text for event in events) == alone("abc", 300)
    wait_for(lambda: server.get("/health")[0] == 200)  # where the stream ended before the loss was noticed
    health = json.loads(server.get("/health")[1])
    assert (health["status"], health["restarts"], health["ranks"][1]["state"]) == ("degraded", 0, "gone")
    assert health["why"] == "rank 1 is lost, the others go on"
    stream = client.completions.create(prompt="abc", max_tokens=ENDLESS, stream=True, **GREEDY)
    next(stream)
    for rank in (0, 2):
        victims[rank].kill()
    wait_for(lambda: server.get("/health")[0] == 503)
    health = json.loads(server.get("/health")[1])
    assert health["status"] == "down" and health["why"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: client.completions.create(prompt="later", max_tokens=5, **GREEDY))
        with pytest.raises(openai.APIError, match="lost with the ranks that ran it"):
            list(stream)
        assert waiting.result(200).choices[0].text == alone("later", 5)
    health = json.loads(server.get("/health")[1])
    assert (health["status"], health["restarts"]) == ("ready", 1)
    assert not {rank.pid for rank in victims} & {rank.pid for rank in server.ranks()} and len(server.ranks()) == RANKS


@pytest.mark.ranks(RANKS)
def test_a_stopped_rank_is_told_of_before_its_deadline(server):
    victim = server.ranks()[2]
    victim.suspend()
    try:
        wait_for(lambda: server.get("/health")[0] == 503, seconds=20)
        assert "rank 2 is stopped" in json.loads(server.get("/health")[1])["why"]
    finally:
        victim.resume()
    wait_for(lambda: server.get("/health")[0] == 200)


@pytest.mark.ranks(RANKS)
def test_sigterm_ends_what_runs_and_takes_nothing_new(server, client, alone):
    """The last test that uses the server: an endless request keeps it draining until all has been looked at."""
    holding = endless(server)
    incomplete = socket.create_connection(("127.0.0.1", server.port))
    incomplete.sendall(head("Content-Length: 10") + b"{")
    stream = client.completions.create(prompt="abc", max_tokens=300, stream=True, **GREEDY)
    events = [next(stream)]
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.get("/health")[0] == 503)
    with pytest.raises(openai.InternalServerError, match="draining"):
        client.completions.create(prompt="abc", max_tokens=3, **GREEDY)
    events += list(stream)
    assert "".join(event.choices[0].text for event in events) == alone("abc", 300)
    holding.close()
    count, last = server.drained()
    assert b"service_draining" in incomplete.recv(4096)
    assert last == f"drained: answered {count - 1}, cut off 0, left by clients 1"
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.ranks(1)
def test_ctrl_c_of_a_terminal_says_what_it_waits_for_and_what_became_of_it(tiny):
    """Every process of the group gets the signal. The one slot is taken for longer than the drain lasts."""
    server = Server(tiny, "--max-num-seqs", "1", "--api-processes", "2", "--drain-s", "1", ranks=1)
    with endless(server) as running:
        wait_for(lambda: server.figure("vllm:num_requests_running") == 1)
        with endless(server, n=2) as waiting:
            wait_for(lambda: server.figure("vllm:num_requests_waiting") == 2)
            before = len(server.lines)
            os.killpg(server.process.pid, signal.SIGINT)
            assert server.wait() == 0
            assert b" 503 " in running.recv(4096) and b" 503 " in waiting.recv(4096)
    said = [line for line in server.lines[before:] if "tokens/s" not in line]  # those come every second
    assert said == [
        "draining: running 1, waiting 2; at most 1 s (Ctrl-C again ends at once)\n",
        "drained: answered 0, cut off 3\n",
    ]


@pytest.mark.ranks(1)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once(tiny, number, status):
    server = Server(tiny, "--drain-s", "1000", ranks=1)
    ranks = server.ranks()
    stream = server.client.completions.create(prompt="abc", max_tokens=ENDLESS, stream=True, **GREEDY)
    next(stream)
    server.process.send_signal(number)
    wait_for(lambda: server.get("/health")[0] == 503)
    assert server.end(number) == status
    wait_for(lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks))


def test_what_cannot_be_served_is_said_in_a_sentence(command_line, tiny, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, error = command_line("serve", "--model", tiny, "--port", port)
        assert (status, error) == (
            2,
            f"lockstep: error: 127.0.0.1 port {port} cannot be used: Address already in use\n",
        )
    status, _, error = command_line("serve", "--model", str(tmp_path), "--port", 0)
    assert status == 2 and str(tmp_path) in error and "Traceback" not in error
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for arguments in (
        ["--api-key", ""],
        ["--api-key", "ä"],
        ["--api-key-file", str(tmp_path / "no")],
        ["--api-key-file", str(tmp_path / "binary")],
        ["--chat-template", str(tmp_path / "binary")],
        ["--port", "70000"],
    ):
        status, _, error = command_line("serve", "--model", tiny, *arguments)
        assert status == 2 and error.count("\n") == 1, error
    template = tmp_path / "template.jinja"
    for text, told in (("{% if %}", "line 1: Expected an expression"), ("a\n{{ 1 | of_nobody }}", "line 2: No filter")):
        template.write_text(text)
        status, _, error = command_line("serve", "--model", tiny, "--chat-template", template, "--port", 0)
        assert status == 2 and f"error: --chat-template is no Jinja: {told}" in error, error
    template.write_text("{{ messages[0].content }}")
    mute = shutil.copytree(tiny, tmp_path / "mute", ignore=shutil.ignore_patterns("*token*"))
    status, _, error = command_line("serve", "--model", mute, "--chat-template", template, "--port", 0)
    assert status == 2 and f"--chat-template needs a tokenizer, and the checkpoint {mute} has none" in error, error
    assert command_line("serve", "--model", tiny, env={"RANK": "0"})[0] == 2
