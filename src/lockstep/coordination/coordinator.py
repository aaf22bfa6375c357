"""One agreement: every rank announces its work, checks the other ranks' records, and learns who is missing."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lockstep.coordination.flight_recorder import Phase
from lockstep.coordination.peers import Peers
from lockstep.coordination.step import StepDecision, StepRecord, decide_columns
from lockstep.coordination.transports import ProcessGroupTransport, Transport
from lockstep.coordination.wire import MESSAGE_BYTES, Header, Wire, decode, decode_message, encode, encode_message
from lockstep.errors import (
    ConfigurationError,
    LockstepError,
    PeerFailedError,
    RankAbsentError,
    RankMismatchError,
    TokenCountError,
)

if TYPE_CHECKING:
    import torch.distributed as dist

_MESSAGE_ROUNDS = 4  # a failure's message travels in this many exchanges


class Coordinator:
    """Agreement among all ranks before each step: one exchange, one deadline, the same verdict on all ranks.

    Args:
        process_group: the ranks that agree; any backend. Left open: who opened it closes it.
        transport: how records travel; by default one all-gather on `process_group`.
        rank: this rank, 0..num_ranks-1; by default its rank in `process_group`.
        tensor_parallel_size: ranks per group that shares its requests, >= 1.
        deadline_s: longest wait for any other rank, in seconds, > 0.
        fingerprint: 32-bit hash of what this rank runs; ranks with different ones are refused at the first agreement.
        epoch: how often groups have been reopened; part of every header: a rank of an older epoch is refused.
        peers: records this rank's actions, and knows where the other ranks are.
    """

    def __init__(
        self, process_group: "dist.ProcessGroup | None" = None, *, transport: Transport | None = None,
        rank: int | None = None, tensor_parallel_size: int = 1, deadline_s: float = 30.0, fingerprint: int = 0,
        epoch: int = 0, peers: Peers | None = None,
    ) -> None:  # fmt: skip
        if not deadline_s > 0:
            raise ConfigurationError(f"deadline_s must be > 0, got {deadline_s}")
        if not 0 <= fingerprint < 2**32:
            raise ConfigurationError(f"fingerprint must be in 0..2**32-1, got {fingerprint}")
        if process_group is not None:
            transport = transport or ProcessGroupTransport(process_group)
            rank = process_group.rank() if rank is None else rank
        if transport is None or rank is None:
            raise ConfigurationError("a coordinator needs a process group, or a transport and its rank")
        if tensor_parallel_size < 1 or transport.num_ranks % tensor_parallel_size:
            raise ConfigurationError(
                f"tensor_parallel_size must divide the {transport.num_ranks} ranks, got {tensor_parallel_size}"
            )
        self.transport, self.rank = transport, rank
        self.tensor_parallel_size = tensor_parallel_size
        self.deadline_s = deadline_s
        self.step = 0
        self.peers = peers or Peers(rank, transport.num_ranks, epoch=epoch)
        self._own = self.peers.name(rank)
        self._header = Header(epoch=epoch, fingerprint=fingerprint)
        self.under_way = False  # an agreement has begun, and this rank does not know its outcome
        self._failure = ""
        self._record_class = StepRecord

    @property
    def usable(self) -> bool:
        """False once a wait has ended in an error: the group is never used again."""
        return not self.peers.gave_up

    def agree(self, record: StepRecord) -> StepDecision:
        """Send this rank's record, and return the decision that all ranks make from all records. Collective.

        Raises:
            RankMismatchError: a header or an `equal` field differs, or the collectives issued so far; on all ranks.
            PeerFailedError: another rank said that it failed; carries its message.
            RankAbsentError: ranks did not come before the deadline; the coordinator is unusable from then on.
            TokenCountError: a negative number of tokens.
        """
        step, peers, own = self.step, self.peers, self._own
        self._record_class = type(record)
        peers.recorder.step = step
        peers.mark(Phase.AGREEMENT, detail=record.num_tokens)
        if peers.gave_up:
            text = f"rank {own}: these groups ended in an error and are not used again: {peers.gave_up}"
            raise RankAbsentError(text)
        if record.num_tokens < 0:
            raise TokenCountError(f"num_tokens must be >= 0, got {record.num_tokens} on rank {own}")
        wire = encode(self._header, step, record, peers.recorder.fingerprint)
        self.under_way, self.step = True, step + 1
        received = self._exchange(wire)
        self.under_way = False
        try:
            columns = decode(received, wire, type(record), peers.processes)
            decision = decide_columns(type(record), columns, self.tensor_parallel_size, peers.processes)
        except (RankMismatchError, TokenCountError) as error:
            self.give_up(error)  # from here on the ranks' steps may be out of order
            raise type(error)(f"{error}{peers.recorder.file_note()}") from None
        peers.check_last_words()  # a rank may have sent its record and then given up waiting for this one
        if decision.values["failed"]:
            messages = self._exchange_messages(self._failure if record.failed else "")
            if not record.failed:
                failed = decision.failed_ranks
                text = "; ".join(f"rank {peers.name(rank)} raised {messages[rank]}" for rank in failed)
                # A rank that only passes on another rank's failure is not to blame.
                first = next((r for r in failed if not messages[r].startswith(PeerFailedError.__name__)), failed[0])
                raise PeerFailedError(f"rank {own} stops at step {step}: {text}", peers.name(first), messages[first])
        peers.recorder.note(decision.num_tokens_across_dp)
        return decision

    def fail(self, error: BaseException, record_class: type[StepRecord] | None = None) -> None:
        """Tell all ranks that this one has failed, in place of its next agreement. Collective.

        The other ranks raise `PeerFailedError` with its message. Always returns, so that the caller can raise its own
        error: at once where the groups are unusable, and also where no other rank can be reached.

        `record_class` is that of the ranks' records, by default that of the last agreement.
        """
        if self.usable:
            self._failure = f"{type(error).__name__}: {error}"
            with contextlib.suppress(LockstepError):
                self.agree((record_class or self._record_class)(failed=True))

    def give_up(self, error: BaseException) -> None:
        """Mark the ranks' groups as unusable, because of an error inside a collective, and tell the other ranks."""
        if isinstance(error, RankAbsentError):
            self.peers.give_up("absent", str(error), error.absent_ranks)
        elif isinstance(error, PeerFailedError):
            self.peers.give_up("failed", error.peer_message or str(error), (error.rank,))
        elif isinstance(error, (RankMismatchError, TokenCountError)):
            self.peers.give_up("mismatch", str(error))
        else:
            self.peers.give_up("failed", f"{type(error).__name__}: {error}", (self._own,))

    def _exchange_messages(self, message: str) -> list[str]:
        rest, rounds = message.encode(errors="replace"), []
        for _ in range(_MESSAGE_ROUNDS):
            rounds.append(map(decode_message, self._exchange(encode_message(rest[:MESSAGE_BYTES]))))
            rest = rest[MESSAGE_BYTES:]
        return [b"".join(answers).decode(errors="replace") for answers in zip(*rounds, strict=True)]

    def _exchange(self, wire: Wire) -> Sequence[Wire]:
        what = f"the agreement of step {self.step - 1} (epoch {self._header.epoch})"
        return self.peers.exchange(self.transport, wire, self.deadline_s, what)
