"""Engines lose ranks at random moments, and some get them back: outputs equal one process, each token comes once.

`python tests/soak_survivors.py --cases 100 --minutes 10 --seed 1`; the last line is a JSON document with the counts.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from lockstep import Engine, LockstepError, SamplingParams
from lockstep.models.tiny import make_tiny

sys.path.insert(0, str(Path(__file__).parent / "ranks"))
from one_process import one_process

DEADLINE_S = 3.0
MOST_TOKENS = 80
HANG_S = 90.0


class Outputs:
    """What a case hears of its requests."""

    def __init__(self, num_requests):
        self.tokens = [[] for _ in range(num_requests)]
        self.unfinished, self.error, self.twice = set(range(num_requests)), None, 0
        self.changed = threading.Event()

    def on_token(self, entry, delta):
        known = self.tokens[entry.index]
        self.twice += len(entry.checker.token_ids) != len(known) + 1
        known.append(entry.checker.token_ids[-1])
        if delta.finish_reason is not None:
            self.unfinished.discard(entry.index)
            self.changed.set()

    def on_error(self, error):
        self.error = error
        self.changed.set()


class Soak:
    """A model of each kind, what one process generates with it, and the counts."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.counts = dict.fromkeys(
            ("cases", "losses", "epochs", "all lost", "tokens", "hangs", "wrong", "lost", "twice"), 0
        )
        self.slowest_s = 0.0
        folder = tempfile.mkdtemp(prefix="soak-survivors-")
        self.models = [str(make_tiny(f"{folder}/{n}", num_layers=2, num_experts=n)) for n in (6, 8, 12)]
        self.expected = {path: one_process(path) for path in self.models}

    def run_case(self):
        """Start an engine, lose ranks of it, and compare what comes out."""
        rng, counts = self.random, self.counts
        path, num_ranks = rng.choice(self.models), rng.randint(2, 4)
        lengths = [rng.randint(1, MOST_TOKENS) for _ in range(rng.randint(1, 10))]
        prompts = [tuple(rng.randrange(40) for _ in range(rng.choice((1, 3, 30)))) for _ in lengths]
        params = [SamplingParams(max_tokens=length, temperature=0, ignore_eos=True) for length in lengths]
        victims = rng.sample(range(num_ranks), rng.randint(1, num_ranks))
        options = {"survive": rng.randrange(num_ranks), "kv_capacity_tokens": rng.choice((None, 256))}
        if rng.random() < 0.5:
            options["restart_ranks"] = rng.randint(1, 2)
            victims += rng.choices(victims, k=rng.randint(0, 2))  # perhaps while it comes back
        heard, later, began = Outputs(len(prompts)), Outputs(len(prompts)), time.monotonic()
        counts["cases"] += 1
        with Engine(path, data_parallel_size=num_ranks, deadline_s=DEADLINE_S, **options) as engine:
            requests = engine.read_requests([list(prompt) for prompt in prompts], params)
            engine.submit(heard, requests)
            for victim in victims:
                time.sleep(rng.choice((0.0, rng.uniform(0, 0.3), rng.uniform(0, 1.0))))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(engine.ranks()[victim].pid, rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)))
                    counts["losses"] += 1
                if victim == victims[0]:  # while the others go on without it
                    engine.submit(later, requests)
                    if rng.random() < 0.5:
                        engine.abandon(later)
            while heard.unfinished and heard.error is None:
                heard.changed.clear()
                if not heard.changed.wait(HANG_S):
                    counts["hangs"] += 1
                    raise AssertionError(f"case {counts['cases']} hangs: {engine.ranks()}, {engine.stats}")
            counts["epochs"] += engine.stats.epoch
            if len(set(victims)) == num_ranks and heard.error is not None:
                counts["all lost"] += 1
            elif heard.unfinished:
                counts["lost"] += len(heard.unfinished)
                logging.error("case %d lost %s: %s", counts["cases"], heard.unfinished, heard.error)
        counts["twice"] += heard.twice
        for prompt, length, tokens in zip(prompts, lengths, heard.tokens, strict=True):
            wanted = list(self.expected[path](prompt, MOST_TOKENS)[:length])
            counts["tokens"] += len(tokens)
            if tokens != wanted[: len(tokens)]:
                counts["wrong"] += 1
                logging.error("case %d: %s is not %s", counts["cases"], tokens, wanted)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)


def main():
    """Run cases until their number or the time is reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    wanted = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    soak, began = Soak(wanted.seed), time.monotonic()
    try:
        while soak.counts["cases"] < wanted.cases and time.monotonic() - began < 60 * wanted.minutes:
            try:
                soak.run_case()
            except LockstepError as error:
                soak.counts["lost"] += 1
                logging.error("case %d: %s", soak.counts["cases"], error)
    finally:
        minutes = round((time.monotonic() - began) / 60, 1)
        print(json.dumps({**soak.counts, "slowest case, s": round(soak.slowest_s, 1), "minutes": minutes}))


if __name__ == "__main__":
    main()
