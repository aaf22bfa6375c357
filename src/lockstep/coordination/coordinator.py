"""One agreement: every rank says what it has, checks what the others said, and knows who is missing."""

import logging
import time
from typing import TYPE_CHECKING

from lockstep.coordination.step import WORDS, Header, StepDecision, StepRecord, decide, decode, encode
from lockstep.coordination.transports import Pending, ProcessGroupTransport, Transport
from lockstep.errors import ConfigurationError, PeerFailedError, RankAbsentError, RankMismatchError

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger(__name__)

_MESSAGE_ROUNDS = 4  # a failure's message travels in this many exchanges of the same size as a record
_BYTES_PER_ROUND = (WORDS - 1) * 8
_ROLL_CALL_S = 0.5


class Coordinator:
    """Agreement among all ranks before each step. One exchange, one deadline, one verdict on all ranks.

    Args:
        process_group: the ranks that agree; any backend. Left open: who opened it closes it.
        transport: how records travel; by default one all-gather on `process_group`.
        rank: this rank, 0..num_ranks-1; by default its rank in `process_group`.
        tensor_parallel_size: ranks per group that shares its requests, >= 1.
        deadline_s: longest wait for any other rank, in seconds, > 0.
        fingerprint: hash of what this rank runs; ranks with another one are refused at the first agreement.
        epoch: how often groups have been opened anew; part of every header: a rank of an older epoch is refused.
        store: a torch store, used only after a wait has failed, to find out who is still there.

    Raises:
        ConfigurationError: neither group nor transport, or a deadline or size out of range.
    """

    def __init__(
        self,
        process_group: "dist.ProcessGroup | None" = None,
        *,
        transport: Transport | None = None,
        rank: int | None = None,
        tensor_parallel_size: int = 1,
        deadline_s: float = 30.0,
        fingerprint: int = 0,
        epoch: int = 0,
        store: "dist.Store | None" = None,
    ) -> None:
        if transport is None and process_group is None:
            raise ConfigurationError("a coordinator needs a process group or a transport")
        if not deadline_s > 0:
            raise ConfigurationError(f"deadline_s must be > 0, got {deadline_s}")
        if transport is None:
            assert process_group is not None
            transport = ProcessGroupTransport(process_group)
        if rank is None:
            if process_group is None:
                raise ConfigurationError("a coordinator over a bare transport must be told its rank")
            rank = process_group.rank()
        if tensor_parallel_size < 1 or transport.num_ranks % tensor_parallel_size:
            raise ConfigurationError(
                f"tensor_parallel_size must divide the {transport.num_ranks} ranks, got {tensor_parallel_size}"
            )
        self.transport = transport
        self.rank = rank
        self.num_ranks = transport.num_ranks
        self.tensor_parallel_size = tensor_parallel_size
        self.deadline_s = deadline_s
        self.fingerprint = fingerprint
        self.epoch = epoch
        self.step = 0
        self._store = store
        self._failure = ""
        self._closed_by = ""

    @property
    def usable(self) -> bool:
        """False once a wait has ended in an error: the group is never used again."""
        return not self._closed_by

    def agree(self, record: StepRecord) -> StepDecision:
        """Tell all ranks `record` and return what all of them then know. Collective: every rank must call it.

        Raises:
            RankMismatchError: a header or an `equal` field differs; on all ranks.
            PeerFailedError: another rank said that it failed; carries its message.
            RankAbsentError: ranks did not come before the deadline; the coordinator is unusable from then on.
        """
        return self.begin(record).result()

    def begin(self, record: StepRecord) -> "PendingDecision":
        """Send `record` and return at once; `.result()` waits. One agreement may be under way at a time.

        Raises:
            RankAbsentError: the coordinator is unusable since an earlier error.
        """
        if self._closed_by:
            raise RankAbsentError(
                f"rank {self.rank}: these groups ended in an error and are not used again: {self._closed_by}"
            )
        header = Header(epoch=self.epoch, step=self.step, fingerprint=self.fingerprint)
        self.step += 1
        try:
            pending = self.transport.begin(encode(header, record))
        except ConnectionError as error:
            raise self._absent(error, header.step, 0.0) from error
        return PendingDecision(self, header, record, pending)

    def announce_failure(self, error: BaseException) -> None:
        """Keep `error` for the next agreement whose record says `failed`, where its message goes to all ranks."""
        self._failure = f"{type(error).__name__}: {error}"

    def give_up(self, reason: str) -> None:
        """Mark the ranks' groups as unusable, because a collective other than an agreement did not end."""
        self._closed_by = self._closed_by or reason

    def _conclude(self, header: Header, record: StepRecord, pending: Pending) -> StepDecision:
        words = self._wait(pending, header.step)
        try:
            decision = decide(decode(words, header, type(record)), self.tensor_parallel_size)
        except RankMismatchError as error:
            self._closed_by = str(error)  # the ranks' steps may be out of order from here on
            raise
        failed = decision.failed_ranks
        if failed:
            messages = self._exchange_messages(self._failure if record.failed else "", header.step)
            if not record.failed:
                text = "; ".join(f"rank {rank} raised {messages[rank]}" for rank in failed)
                raise PeerFailedError(
                    f"rank {self.rank} stops at step {header.step}: {text}", failed[0], messages[failed[0]]
                )
        return decision

    def _exchange_messages(self, message: str, step: int) -> list[str]:
        data = message.encode()[: _MESSAGE_ROUNDS * _BYTES_PER_ROUND].ljust(_MESSAGE_ROUNDS * _BYTES_PER_ROUND, b"\0")
        received = [b""] * self.num_ranks
        for index in range(_MESSAGE_ROUNDS):
            part = data[index * _BYTES_PER_ROUND : (index + 1) * _BYTES_PER_ROUND]
            words = [index, *(int.from_bytes(part[i : i + 8], "little", signed=True) for i in range(0, len(part), 8))]
            for rank, answer in enumerate(self._wait(self.transport.begin(words), step)):
                received[rank] += b"".join(word.to_bytes(8, "little", signed=True) for word in answer[1:])
        return [text.rstrip(b"\0").decode(errors="replace") for text in received]

    def _wait(self, pending: Pending, step: int) -> list[list[int]]:
        started = time.monotonic()
        try:
            return pending.wait(self.deadline_s)
        except (TimeoutError, ConnectionError) as error:
            raise self._absent(error, step, time.monotonic() - started) from error

    def _absent(self, error: Exception, step: int, waited_s: float) -> RankAbsentError:
        absent = self._roll_call(step)
        if absent:
            who = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))} did not come to"
        else:
            who = "some rank did not come to"
        message = (
            f"rank {self.rank}: {who} the agreement of step {step} (epoch {self.epoch}) "
            f"within {waited_s:.2f} s, deadline {self.deadline_s:g} s: {error}"
        )
        self._closed_by = message
        return RankAbsentError(message, absent)

    def _roll_call(self, step: int) -> tuple[int, ...]:
        """Find out which ranks have not come: all that are still there write their name into the store."""
        if self._store is None:
            return ()
        keys = [f"roll/{self.epoch}/{step}/{rank}" for rank in range(self.num_ranks)]
        try:
            self._store.set(keys[self.rank], "here")
            until = time.monotonic() + _ROLL_CALL_S
            while True:
                missing = tuple(rank for rank, key in enumerate(keys) if not self._store.check([key]))
                if not missing or time.monotonic() > until:
                    return missing
                time.sleep(0.02)
        except RuntimeError as error:  # the store may have died with the rank that kept it
            logger.warning("rank %d: no roll call, the store does not answer: %s", self.rank, error)
            return ()


class PendingDecision:
    """An agreement that is under way. `result()` may be called more than once; it waits only the first time."""

    def __init__(self, coordinator: Coordinator, header: Header, record: StepRecord, pending: Pending) -> None:
        self._coordinator = coordinator
        self._header = header
        self._record = record
        self._pending = pending
        self._outcome: StepDecision | Exception | None = None

    def result(self) -> StepDecision:
        """Wait for all ranks and return the decision, or raise as `Coordinator.agree` does."""
        if self._outcome is None:
            try:
                self._outcome = self._coordinator._conclude(self._header, self._record, self._pending)
            except Exception as error:
                self._outcome = error
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome
