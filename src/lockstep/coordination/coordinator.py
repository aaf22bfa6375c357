"""One agreement: every rank says what it has, checks what the others said, and knows who is missing."""

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lockstep.coordination.flight_recorder import Phase
from lockstep.coordination.peers import Peers
from lockstep.coordination.step import StepDecision, StepRecord, decide
from lockstep.coordination.transports import Pending, ProcessGroupTransport, RanksMissing, Transport
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
    """Agreement among all ranks before each step. One exchange, one deadline, one verdict on all ranks.

    Args:
        process_group: the ranks that agree; any backend. Left open: who opened it closes it.
        transport: how records travel; by default one all-gather on `process_group`.
        rank: this rank, 0..num_ranks-1; by default its rank in `process_group`.
        tensor_parallel_size: ranks per group that shares its requests, >= 1.
        deadline_s: longest wait for any other rank, in seconds, > 0.
        fingerprint: hash of what this rank runs, 32 bits; ranks with another one are refused at the first agreement.
        epoch: how often groups have been opened anew; part of every header: a rank of an older epoch is refused.
        peers: told what this rank does; knows where the others are.

    Raises:
        ConfigurationError: neither group nor transport, or a deadline or size out of range.
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
        if transport is None:
            raise ConfigurationError("a coordinator needs a process group or a transport")
        if rank is None:
            raise ConfigurationError("a coordinator over a bare transport must be told its rank")
        if tensor_parallel_size < 1 or transport.num_ranks % tensor_parallel_size:
            raise ConfigurationError(
                f"tensor_parallel_size must divide the {transport.num_ranks} ranks, got {tensor_parallel_size}"
            )
        self.transport = transport
        self.rank = rank
        self.num_ranks = transport.num_ranks
        self.tensor_parallel_size = tensor_parallel_size
        self.deadline_s = deadline_s
        self.epoch = epoch
        self.step = 0
        self.peers = peers or Peers(rank, transport.num_ranks, epoch=epoch)
        self._header = Header(epoch=epoch, fingerprint=fingerprint)
        self.under_way = False  # an agreement has been begun of which this rank does not know the outcome
        self._failure = ""
        self._record_class = StepRecord
        self._closed_by = ""

    @property
    def usable(self) -> bool:
        """False once a wait has ended in an error: the group is never used again."""
        return not self._closed_by

    @property
    def can_watch(self) -> bool:
        """Whether `wanted` can tell."""
        return self.transport.can_watch

    def wanted(self) -> bool:
        """See `Transport`."""
        return self.transport.wanted()

    def agree(self, record: StepRecord) -> StepDecision:
        """Tell all ranks `record` and return what all of them then know. Collective: every rank must call it.

        Raises:
            RankMismatchError: a header or an `equal` field differs, or the collectives issued so far; on all ranks.
            PeerFailedError: another rank said that it failed; carries its message.
            RankAbsentError: ranks did not come before the deadline; the coordinator is unusable from then on.
            TokenCountError: a negative number of tokens.
        """
        step, peers = self.step, self.peers
        self._record_class = type(record)
        peers.recorder.step = step
        peers.mark(Phase.AGREEMENT, detail=record.num_tokens)
        words, pending = self._send(record)
        return self._conclude(step, words, record, pending)

    def _send(self, record: StepRecord) -> tuple[Wire, Pending]:
        own = self.peers.name(self.rank)
        if self._closed_by:
            text = f"rank {own}: these groups ended in an error and are not used again: {self._closed_by}"
            raise RankAbsentError(text)
        if record.num_tokens < 0:
            raise TokenCountError(f"num_tokens must be >= 0, got {record.num_tokens} on rank {own}")
        step = self.step
        words = encode(self._header, step, record, self.peers.recorder.fingerprint)
        self.under_way = True
        self.step = step + 1
        try:
            return words, self.transport.begin(words)
        except ConnectionError as error:
            raise self._absent(f"the agreement of step {step} could not be begun ({error})") from error

    def fail(self, error: BaseException, record_class: type[StepRecord] | None = None) -> None:
        """Tell all ranks that this one has failed, in place of its next agreement. Collective.

        The others raise `PeerFailedError` with the error's message. Returns in any case, so that the caller can raise
        its own error: at once where the groups are unusable, and also where the others cannot be reached any more.

        `record_class` is that of the ranks' records, by default that of the last agreement.
        """
        if not self.usable:
            return
        self._failure = f"{type(error).__name__}: {error}"
        with contextlib.suppress(LockstepError):
            self.agree((record_class or self._record_class)(failed=True))

    def give_up(self, error: BaseException) -> None:
        """Mark the ranks' groups as unusable, because of an error inside a collective, and tell the others."""
        numbers = {number: rank for rank, number in enumerate(self.peers.processes)}
        if isinstance(error, RankAbsentError):
            ranks = [numbers[rank] for rank in error.absent_ranks if rank in numbers]
            self.peers.give_up("absent", str(error), ranks)
        elif isinstance(error, PeerFailedError) and error.rank in numbers:
            self.peers.give_up("failed", error.peer_message or str(error), (numbers[error.rank],))
        elif isinstance(error, RankMismatchError):
            self.peers.give_up("mismatch", str(error))
        else:
            self.peers.give_up("failed", f"{type(error).__name__}: {error}", (self.rank,))
        self._close(error)

    def _close(self, error: BaseException) -> None:
        self._closed_by = self._closed_by or f"{type(error).__name__}: {error}"

    def _conclude(self, step: int, mine: Wire, record: StepRecord, pending: Pending) -> StepDecision:
        peers = self.peers
        words = self._wait(pending, step)
        self.under_way = False
        try:
            names = peers.processes
            decision = decide(decode(words, mine, type(record), names), self.tensor_parallel_size, names)
        except (RankMismatchError, TokenCountError) as error:
            # The ranks' steps may be out of order from here on.
            peers.give_up("mismatch", str(error))
            self._close(error)
            raise type(error)(f"{error}{peers.recorder.file_note()}") from None
        try:
            peers.check_last_words()  # of a rank that sent its record, but has given up waiting for this one
        except LockstepError as error:
            self._close(error)
            raise
        if decision.values["failed"]:
            failed = decision.failed_ranks
            messages = self._exchange_messages(self._failure if record.failed else "", step)
            if not record.failed:
                text = "; ".join(f"rank {peers.name(rank)} raised {messages[rank]}" for rank in failed)
                # Who only passes on what another rank did is not to blame.
                first = next((r for r in failed if not messages[r].startswith(PeerFailedError.__name__)), failed[0])
                stops = f"rank {peers.name(self.rank)} stops at step {step}"
                raise PeerFailedError(f"{stops}: {text}", peers.name(first), messages[first])
        peers.recorder.note(decision.num_tokens_across_dp)
        return decision

    def _exchange_messages(self, message: str, step: int) -> list[str]:
        data = message.encode(errors="replace")[: _MESSAGE_ROUNDS * MESSAGE_BYTES]
        received = [b""] * self.num_ranks
        for index in range(_MESSAGE_ROUNDS):
            words = encode_message(data[index * MESSAGE_BYTES : (index + 1) * MESSAGE_BYTES])
            for rank, answer in enumerate(self._wait(self.transport.begin(words), step)):
                received[rank] += decode_message(answer)
        return [text.decode(errors="replace") for text in received]

    def _wait(self, pending: Pending, step: int) -> Sequence[Wire]:
        started = time.monotonic()
        try:
            return pending.wait(self.deadline_s, self.peers.check)
        except LockstepError as error:  # another rank has ended the wait
            self._close(error)
            raise
        except (TimeoutError, ConnectionError) as error:
            ranks = error.ranks_missing if isinstance(error, RanksMissing) else ()
            after = f"after {time.monotonic() - started:.2f} s, deadline {self.deadline_s:g} s"
            text = f"the agreement of step {step} (epoch {self.epoch}) did not end {after}: {error}"
            raise self._absent(text, ranks) from error

    def _absent(self, waited_for: str, ranks: tuple[int, ...] = ()) -> LockstepError:
        absent = self.peers.absent(waited_for, ranks)
        self._close(absent)
        return absent
