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
        peers.recorder.step = step
        peers.mark(Phase.AGREEMENT, detail=record.num_tokens)
        if peers.gave_up:
            text = f"rank {own}: these groups ended in an error and are not used again: {peers.gave_up}"
            raise RankAbsentError(text)
        if record.num_tokens < 0:
            raise TokenCountError(f"num_tokens must be >= 0, got {record.num_tokens} on rank {own}")
        wire = encode(self._header, step, record, peers.recorder.fingerprint)
        received = self._exchange(wire)
        try:
            columns = decode(received, wire, type(record), peers.processes)
            decision = decide_columns(type(record), columns, self.tensor_parallel_size, peers.processes)
        except (RankMismatchError, TokenCountError) as error:
            if failures := {rank: text for rank, text in enumerate(map(decode_message, received)) if text}:
                raise self._after_failures(step, failures) from None
            self.give_up(error)  # from here on the ranks' steps may be out of order
            raise type(error)(f"{error}{peers.recorder.file_note()}") from None
        peers.check_last_words()  # a rank may have sent its record and then given up waiting for this one
        peers.recorder.note(decision.num_tokens_across_dp)
        return decision

    def fail(self, error: BaseException) -> None:
        """Tell all ranks that this one has failed, in place of its next agreement. Collective.

        The other ranks raise `PeerFailedError` with its message. Always returns, so that the caller can raise its own
        error: at once where the groups are unusable, and also where no other rank can be reached.
        """
        if self.usable:
            message = f"{type(error).__name__}: {error}".encode(errors="replace")
            with contextlib.suppress(LockstepError):
                self.peers.recorder.step = self.step
                self.peers.mark(Phase.AGREEMENT)
                self._exchange(encode_message(message[:MESSAGE_BYTES]))

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

    def _after_failures(self, step: int, failures: dict[int, bytes]) -> PeerFailedError:
        """Return the error in an agreement to which some ranks have sent why they failed."""
        messages = {rank: text.decode(errors="replace") for rank, text in failures.items()}
        text = "; ".join(f"rank {self.peers.name(rank)} raised {message}" for rank, message in messages.items())
        # A rank that only passes on another rank's failure is not to blame.
        causes = [rank for rank in messages if not messages[rank].startswith(PeerFailedError.__name__)]
        first = (causes or list(messages))[0]
        text = f"rank {self._own} stops at step {step}: {text}"
        return PeerFailedError(text, self.peers.name(first), messages[first])

    def _exchange(self, wire: Wire) -> Sequence[Wire]:
        what = f"the agreement of step {self.step} (epoch {self._header.epoch})"
        self.under_way, self.step = True, self.step + 1
        received = self.peers.exchange(self.transport, wire, self.deadline_s, what)
        self.under_way = False
        return received
