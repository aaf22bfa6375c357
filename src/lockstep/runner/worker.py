"""A rank of `lockstep.Engine`, as a process of its own: it works in one epoch after another."""

from __future__ import annotations

import logging
from multiprocessing.connection import Connection
from typing import Any

from lockstep.errors import PeerFailedError, RankAbsentError
from lockstep.runner.failures import failure_of
from lockstep.runner.mailbox import ConnectionMailbox, Mailbox
from lockstep.runner.ranks import EngineOptions

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 5.0
_LEAVE_S = 5.0
# The launcher may have to wait for a rank's deadline, and once more for one that does not say that it has stopped.
_DECISION_DEADLINES, _DECISION_S = 3, 30.0


def run_worker(connection: Connection, rank: int, options: EngineOptions, port: int) -> None:
    """Run one rank until it is told to stop. Ranks meet in the store at this port."""
    mailbox = ConnectionMailbox(connection)
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: %(levelname)s %(name)s: %(message)s")
    try:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # those of several ranks would overwrite each other
        _work(rank, options, port, mailbox)
        mailbox.send({"ended": True})
    except BaseException as error:
        mailbox.send(failure_of(rank, error))
    mailbox.flush(_LAST_WORDS_S)


def _work(rank: int, options: EngineOptions, port: int, mailbox: Mailbox) -> None:
    import torch.distributed as dist

    from lockstep.coordination.membership import await_members
    from lockstep.models.respread import respread
    from lockstep.runner.rank_loop import run_rank
    from lockstep.runner.ranks import (
        detokenizer_of,
        find_tokenizer,
        join_group,
        leave_groups,
        load_model,
        make_engine,
        open_store,
        torch_dtype,
    )  # fmt: skip

    store = open_store(port, options.start_timeout_s)
    members: tuple[int, ...] = tuple(range(options.world_size))
    detokenizer = detokenizer_of(find_tokenizer(options.model))
    model: Any = None
    while True:
        try:
            if options.world_size > 1:
                own_store = dist.PrefixStore(f"epoch/{mailbox.epoch}", open_store(port, options.start_timeout_s))
                limit_s = options.deadline_s if mailbox.epoch else options.start_timeout_s
                join_group(own_store, members.index(rank), len(members), limit_s)
            if model is None:
                model = load_model(options)
            else:
                respread(model, options.model, dist.group.WORLD, dtype=torch_dtype(options), device=options.device)
            engine = make_engine(model, options)
            mailbox.send({"ready": engine.about()})
            run_rank(engine, mailbox, detokenizer=detokenizer)
            return
        except (RankAbsentError, PeerFailedError) as error:
            if model is None or not options.can_survive:
                raise
            mailbox.send(failure_of(rank, error))
        members = await_members(store, rank, mailbox.epoch + 1, _DECISION_DEADLINES * options.deadline_s + _DECISION_S)
        mailbox.epoch += 1
        leave_groups(model, _LEAVE_S)
