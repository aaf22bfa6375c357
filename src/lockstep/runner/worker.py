"""A rank of `lockstep.Engine`, as a process of its own."""

from __future__ import annotations

import logging
from multiprocessing.connection import Connection

from lockstep.runner.failures import failure_of
from lockstep.runner.mailbox import ConnectionMailbox
from lockstep.runner.ranks import EngineOptions

_LAST_WORDS_S = 5.0


def run_worker(connection: Connection, rank: int, options: EngineOptions, port: int) -> None:
    """Run one rank until it is told to stop. Ranks meet in the store at this port."""
    mailbox = ConnectionMailbox(connection)
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: %(levelname)s %(name)s: %(message)s")
    try:
        from transformers.utils import logging as transformers_logging

        from lockstep.runner.rank_loop import run_rank
        from lockstep.runner.ranks import detokenizer_of, find_tokenizer, join_group, make_engine

        transformers_logging.disable_progress_bar()  # those of several ranks would overwrite each other
        join_group(rank, options.world_size, port, options.start_timeout_s)
        engine = make_engine(options)
        detokenizer = detokenizer_of(find_tokenizer(options.model))
        mailbox.send({"ready": engine.about()})
        run_rank(engine, mailbox, detokenizer=detokenizer)
        mailbox.send({"ended": True})
    except BaseException as error:
        mailbox.send(failure_of(rank, error))
    mailbox.flush(_LAST_WORDS_S)
