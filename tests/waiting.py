"""Waits of a test for what other processes do or an engine says, and whether a process is still there."""

import threading
import time

import psutil


def is_running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.002)


class Heard:
    """Every token that a listener hears, with its time."""

    def __init__(self, num_requests):
        self.tokens, self.times, self.error = [[] for _ in range(num_requests)], [], None
        self.left = threading.Semaphore(0)

    def on_token(self, entry, delta):
        assert len(entry.checker.token_ids) == len(self.tokens[entry.index]) + 1  # one more, none twice
        self.tokens[entry.index].append(entry.checker.token_ids[-1])
        self.times.append(time.monotonic())
        if delta.finish_reason is not None:
            self.left.release()

    def wait_for_more(self, num_tokens):
        before = len(self.times)
        wait_for(lambda: len(self.times) >= before + num_tokens)

    def on_error(self, error):
        self.error = error
        for _ in self.tokens:
            self.left.release()
