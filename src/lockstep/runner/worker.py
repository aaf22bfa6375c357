"""A rank of `lockstep.Engine`, as a process of its own."""

from __future__ import annotations

import logging
from multiprocessing.connection import Connection
from typing import Any

from lockstep.runner import ranks
from lockstep.runner.failures import failure_of
from lockstep.runner.mailbox import ConnectionMailbox
from lockstep.runner.member import Member

_LAST_WORDS_S = 5.0


def run_worker(
    connection: Connection, rank: int, options: ranks.EngineOptions, port: int, first_epoch: int = 0
) -> None:
    """Run one rank until it is told to stop. Ranks meet in the store at this port. See `Member` for `first_epoch`."""
    mailbox = ConnectionMailbox(connection)
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: %(levelname)s %(name)s: %(message)s")
    try:
        from transformers.utils import logging as transformers_logging

        from lockstep.runner.rank_loop import run_rank

        transformers_logging.disable_progress_bar()  # those of several ranks would overwrite each other
        detokenizer = ranks.detokenizer_of(ranks.find_tokenizer(options.model))
        member = Member(rank, options, port, options.start_timeout_s, mailbox.send, first_epoch)

        def serve(model: Any) -> None:
            mailbox.epoch = member.epoch
            engine = ranks.make_engine(model, options)
            mailbox.send({"ready": engine.about()})
            run_rank(engine, mailbox, detokenizer=detokenizer, ends_epoch=member.was_asked_to_stop)

        member.work(serve)
        mailbox.send({"ended": True})
    except BaseException as error:
        mailbox.send(failure_of(rank, error))
    mailbox.flush(_LAST_WORDS_S)
