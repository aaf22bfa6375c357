"""A rank of `lockstep.Engine`, as a process of its own: it works in one epoch after another."""

from __future__ import annotations

import logging
from multiprocessing.connection import Connection

from lockstep.errors import PeerFailedError, RankAbsentError
from lockstep.runner import ranks
from lockstep.runner.failures import failure_of
from lockstep.runner.mailbox import ConnectionMailbox, Mailbox
from lockstep.runner.ranks import EngineOptions

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 5.0
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
    from lockstep.models.respread import Respreader
    from lockstep.moe.survivors import widened, without_lost
    from lockstep.runner.rank_loop import run_rank

    wait_s = _DECISION_DEADLINES * options.deadline_s + _DECISION_S
    store = ranks.open_store(port, options.start_timeout_s)
    members: tuple[int, ...] = tuple(range(options.world_size))
    detokenizer = ranks.detokenizer_of(ranks.find_tokenizer(options.model))
    model, respreader, placement = None, None, None
    while True:
        try:
            if options.world_size > 1:
                limit_s = options.deadline_s if mailbox.epoch else options.start_timeout_s
                own_store = dist.PrefixStore(f"epoch/{mailbox.epoch}", ranks.open_store(port, limit_s))
                ranks.join_group(own_store, members.index(rank), len(members), limit_s)
            if model is None:
                model = ranks.load_model(options)
                if options.can_survive:
                    how_loaded = {"dtype": ranks.torch_dtype(options), "device": options.device}
                    respreader = Respreader(model, options.model, **how_loaded)
                    placement = widened(respreader.placement, options.survive)
            if respreader is not None and (mailbox.epoch or options.survive):
                assert placement is not None and dist.group.WORLD is not None
                respreader.spread(placement, dist.group.WORLD)
            engine = ranks.make_engine(model, options)
            mailbox.send({"ready": engine.about()})
            run_rank(engine, mailbox, detokenizer=detokenizer)
            return
        except (RankAbsentError, PeerFailedError) as error:
            if placement is None:
                raise
            mailbox.send(failure_of(rank, error))
        before, members = members, await_members(store, rank, mailbox.epoch + 1, wait_s)
        placement = without_lost(placement, [before.index(member) for member in members])
        mailbox.epoch += 1
        ranks.leave_groups(model)
