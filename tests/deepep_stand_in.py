"""A stand-in for DeepEP: the documented signatures and results of its `Buffer` in normal mode, over gloo on CPUs.

It is not DeepEP. It takes the arguments of DeepEP 2.1.0 and asserts what that version's host code asserts, so that an
adapter can be tried where DeepEP cannot be built. Ranks exchange whole Python objects; nothing here is fast.
"""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

topk_idx_t = torch.int64
_MAX_NVLINK_RANKS, _MAX_TOP_K = 8, 32


@dataclass(frozen=True)
class Config:
    """Sizes of buffers; the figures mean nothing here beyond being enough for the rows of its hidden size."""

    num_ranks: int

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        assert num_ranks == self.num_ranks
        return hidden_bytes * 128

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * 128 if num_ranks > _MAX_NVLINK_RANKS else 0


class Buffer:
    """`get_dispatch_layout`, `dispatch` without a cached handle, and `combine` without biases."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        assert num_nvl_bytes % 128 == 0
        assert num_rdma_bytes % 128 == 0
        self.group, self.group_size, self.rank = group, group.size(), group.rank()
        self._row_bytes = num_nvl_bytes // 128

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        sizes = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
        assert num_ranks in sizes, f"unsupported number of ranks: {num_ranks}"
        return Config(num_ranks)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx: torch.Tensor, num_experts: int, previous_event: Any = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor, Any]:  # fmt: skip
        assert topk_idx.data_ptr() != 0, "no rows, which UCCL's Buffer of the same interface refuses"
        assert topk_idx.dtype == topk_idx_t
        assert topk_idx.dim() == 2
        assert topk_idx.is_contiguous()
        num_local = num_experts // self.group_size
        is_in_rank = torch.zeros(len(topk_idx), self.group_size, dtype=torch.bool)
        per_expert = torch.zeros(num_experts, dtype=torch.int32)
        for row, experts in enumerate(topk_idx.tolist()):
            for expert in experts:
                if expert >= 0:
                    is_in_rank[row, expert // num_local] = True
                    per_expert[expert] += 1
        return is_in_rank.sum(0, dtype=torch.int32), None, per_expert, is_in_rank, None

    def dispatch(
        self, x: torch.Tensor, handle: Any = None, num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None, is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None, topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None, expert_alignment: int = 1, num_worst_tokens: int = 0,
        config: Config | None = None, previous_event: Any = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int], Any, Any]:  # fmt: skip
        assert handle is None
        assert num_tokens_per_rank is not None and num_tokens_per_rank.dtype == torch.int32
        assert is_token_in_rank is not None and is_token_in_rank.dtype == torch.bool
        assert num_tokens_per_expert is not None and num_tokens_per_expert.dtype == torch.int32
        assert topk_idx is not None and topk_idx.dtype == topk_idx_t and topk_idx.is_contiguous()
        assert topk_weights is not None and topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
        assert x.dtype == torch.bfloat16 and x.dim() == 2 and x.is_contiguous() and x.shape[1] % 8 == 0
        assert x.shape[1] * x.element_size() <= self._row_bytes, "the buffer was made for shorter rows"
        assert len(x) == len(topk_idx) == len(topk_weights) == len(is_token_in_rank)
        assert topk_idx.shape[1] <= _MAX_TOP_K
        num_local = len(num_tokens_per_expert) // self.group_size
        first = self.rank * num_local
        sources = self._exchange((x, topk_idx, topk_weights, is_token_in_rank))
        own = [in_rank[:, self.rank] for *_, in_rank in sources]
        rows, ids, weights = (
            torch.cat([source[part][mine] for source, mine in zip(sources, own, strict=True)]) for part in range(3)
        )
        is_local = (ids >= first) & (ids < first + num_local)
        ids, weights = torch.where(is_local, ids - first, -1), torch.where(is_local, weights, 0.0)
        per_expert = [int((ids == expert).sum()) for expert in range(num_local)]
        return rows, ids, weights, per_expert, (is_token_in_rank, [int(mine.sum()) for mine in own]), None

    def combine(
        self, x: torch.Tensor, handle: Any, topk_weights: torch.Tensor | None = None, bias: Any = None,
        config: Config | None = None, previous_event: Any = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:  # fmt: skip
        is_token_in_rank, received = handle
        assert x.dtype == torch.bfloat16 and x.dim() == 2 and x.is_contiguous()
        assert len(x) == sum(received)
        assert bias is None and topk_weights is None
        total = torch.zeros(len(is_token_in_rank), x.shape[1])
        for rank, parts in enumerate(self._exchange(x.split(received))):
            total[is_token_in_rank[:, rank]] += parts[self.rank].float()
        return total.to(torch.bfloat16), None, None

    def _exchange(self, mine: Any) -> list[Any]:
        everyones: list[Any] = [None] * self.group_size
        dist.all_gather_object(everyones, mine, self.group)
        return everyones


def install() -> None:
    """Let `import deep_ep` give this stand-in, in this process."""
    module: Any = ModuleType("deep_ep")
    module.Buffer, module.Config, module.topk_idx_t = Buffer, Config, topk_idx_t
    sys.modules["deep_ep"] = module
