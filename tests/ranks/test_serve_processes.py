"""`lockstep serve --api-processes`: HTTP in processes beside the launcher, some of which die, stop or never start."""

import contextlib
import json
import os
import signal
import socket
import threading
import urllib.request

import psutil
import pytest
from serving import CHAT, GREEDY, SLOW, Server, endless, openai, start, texts_of_one_process, wait_for

from lockstep.models.tiny import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("serve") / "tiny", num_layers=2, num_experts=12))


@pytest.fixture(scope="module")
def alone(tiny):
    return texts_of_one_process(tiny)


@pytest.fixture(scope="module")
def shared(tiny):
    """A server whose HTTP is answered by two processes beside the launcher."""
    made = Server(tiny, "--api-processes", "2", "--max-num-seqs", "4", "--max-queue", "6", ranks=2)
    yield made
    made.process.kill()


def api_processes(server):
    found = []
    for child in psutil.Process(server.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has ended since
            if "lockstep.serve.api_process" in child.cmdline():
                found.append(child)
    return found


def answers(process, server, stack):
    """Whether a process has a connection to a client, after one more that stays open until the stack ends."""
    stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
    return any(one.status == psutil.CONN_ESTABLISHED for one in process.net_connections("tcp"))


@pytest.mark.ranks(2)
def test_api_processes_answer_as_one_process_does(shared, alone):
    """Of thirty connections, none of which is used twice, either process has some."""

    def ask(number):
        body = {"prompt": [[number], [number, 2]], "max_tokens": 3 + number, "temperature": 0, "ignore_eos": True}
        status, document, _ = shared.post(body | {"n": 2, "logprobs": 1}, Connection="close")
        return status, [choice["text"] for choice in document["choices"]], document["usage"]["total_tokens"]

    for number in range(30):
        count = 3 + number
        texts = [alone([number], count)] * 2 + [alone([number, 2], count)] * 2
        assert ask(number) == (200, texts, 3 + 4 * count)
    assert len(api_processes(shared)) == 2
    assert shared.figure("vllm:generation_tokens_total") == sum(4 * (3 + number) for number in range(30))
    events = shared.client.chat.completions.create(**CHAT, max_tokens=9, stream=True, **GREEDY)
    assert "".join(event.choices[0].delta.content for event in events) == alone("user: a\nassistant:", 9)


@pytest.mark.ranks(2)
def test_limits_and_errors_hold_in_every_api_process(shared):
    before = shared.figure("lockstep_http_errors_total")
    for _ in range(6):
        assert shared.post({"prompt": "a"}, Authorization="Bearer wrong", Connection="close")[0] == 401
        assert shared.post(b"{", Connection="close")[0] == 400
        assert shared.post({"prompt": "a", "max_tokens": 10**6}, Connection="close")[0] == 400
    assert shared.figure("lockstep_http_errors_total") - before == 18
    with contextlib.ExitStack() as stack:
        for state, count in (("running", 4), ("running", 8), ("waiting", 3), ("waiting", 6)):  # of both together
            stack.enter_context(endless(shared, n=4 if state == "running" else 3))
            wait_for(lambda count=count, state=state: shared.figure(f"vllm:num_requests_{state}") == count)
        for _ in range(6):
            status, document, headers = shared.post({"prompt": "a"}, Connection="close")
            assert (status, document["error"]["code"], int(headers["Retry-After"]) > 0) == (429, "queue_full", True)
    wait_for(lambda: shared.figure("vllm:num_requests_running") == shared.figure("vllm:num_requests_waiting") == 0)


@pytest.mark.ranks(2)
def test_requests_of_a_killed_api_process_are_freed_and_it_is_started_again(shared, alone):
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(endless(shared))
        wait_for(lambda: shared.figure("vllm:num_requests_running") == 6)
        victims = api_processes(shared)
        for victim in victims:
            victim.kill()
        wait_for(lambda: len(api_processes(shared)) == 2 and not set(victims) & set(api_processes(shared)))
        wait_for(lambda: shared.figure("vllm:num_requests_running") == 0)
    assert shared.client.completions.create(prompt="b", max_tokens=5, **GREEDY).choices[0].text == alone("b", 5)
    assert json.loads(shared.get("/health")[1])["status"] == "ready"


@pytest.mark.ranks(2)
def test_an_api_process_that_stands_still_is_killed_and_started_again(shared, alone):
    with contextlib.ExitStack() as stack:  # one that is still starting may be silent for longer
        wait_for(lambda: all(answers(process, shared, stack) for process in api_processes(shared)))
    stopped, other = api_processes(shared)
    stopped.suspend()
    wait_for(lambda: len(api_processes(shared)) == 2 and stopped not in api_processes(shared))
    assert other in api_processes(shared)
    assert any(f"API process {stopped.pid} is silent and is killed" in line for line in shared.lines)
    assert shared.client.completions.create(prompt="b", max_tokens=5, **GREEDY).choices[0].text == alone("b", 5)


@pytest.mark.ranks(1)
def test_api_processes_that_never_start_end_the_server(tiny, tmp_path):
    """Long before the ranks are ready, whose start is not waited for."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'lockstep.serve.api_process' in sys.orig_argv:\n    os._exit(7)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = ("--api-processes", "2", "--max-restarts", "2")
    process = start(tiny, *arguments, ranks=1, environment={"PYTHONPATH": path})
    try:
        _, error = process.communicate(timeout=SLOW)
    finally:
        process.kill()
    why = "its process ended with exit code 7"
    last = f"lockstep: error: LockstepError: an API process ended within 120 s of its start (3 in a row): {why}"
    assert process.returncode == 1 and error.splitlines()[-1] == last and "Traceback" not in error, error


@pytest.mark.ranks(1)
def test_questions_that_are_open_at_the_end_leave_no_traceback(tmp_path):
    """The ranks cannot start, and clients that wait for them ask for their health all the time."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "config.json").write_text("{}")
    process = start(str(tmp_path), "--api-processes", "2", "--port", str(port), ranks=1)

    def poll():
        while process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=SLOW):
                pass

    pollers = [threading.Thread(target=poll, daemon=True) for _ in range(4)]
    try:
        for poller in pollers:
            poller.start()
        _, error = process.communicate(timeout=SLOW)
    finally:
        process.kill()
    assert process.returncode == 2 and "Traceback" not in error and "ASGI" not in error, error


@pytest.mark.ranks(2)
def test_a_drain_waits_for_the_streams_of_api_processes(shared, alone):
    holding = endless(shared)
    stream = shared.client.completions.create(prompt="abc", max_tokens=100, stream=True, **GREEDY)
    events, processes = [next(stream)], api_processes(shared)
    os.kill(processes[0].pid, signal.SIGTERM)  # which is not for them
    shared.process.send_signal(signal.SIGTERM)
    wait_for(lambda: shared.get("/health")[0] == 503)
    with pytest.raises(openai.InternalServerError, match="draining"):
        shared.client.completions.create(prompt="abc", max_tokens=3, **GREEDY)
    events += list(stream)
    assert "".join(event.choices[0].text for event in events) == alone("abc", 100)
    holding.close()
    count, last = shared.drained()
    assert last == f"drained: answered {count - 1}, cut off 0, left by clients 1"
    assert not any(process.is_running() for process in processes)
    assert "Traceback" not in "".join(shared.lines)
