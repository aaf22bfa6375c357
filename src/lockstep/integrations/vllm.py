# The DPMetadata that vLLM 0.32 and 0.33 expect, on the arithmetic of lockstep.metadata, and the plugin.
# Nothing of vLLM is imported before the plugin runs. Annotations resolve at run time, as in dp_metadata.py.

import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from sys import getrefcount
from types import ModuleType
from typing import Any

import torch

from lockstep.errors import ConfigurationError
from lockstep.metadata import dp_metadata
from lockstep.metadata.contexts import NO_CONTEXT, UNSHARED, SizesContext, sizes_context
from lockstep.metadata.counts import (
    HoldsCounts,
    TokenCounts,
    check_own_count,
    find_sizes,
    read_counts,
    read_fields,
    set_counts,
    step_context,
)
from lockstep.metadata.sizes import MAX_RANKS, check_counts, check_int, sp_sizes

# A child of vLLM's logger: it inherits handler and level, so our lines look like vLLM's.
logger = logging.getLogger("vllm.plugins.lockstep")

KNOWN_VERSIONS = ("0.32", "0.33")  # their class has been compared with ours; other versions stay unchanged

NO_PCP = 1  # one prefill-context-parallel rank per DP rank: not used

SWITCH = "LOCKSTEP_VLLM"  # opt-in: installing a package must not change another one

MODES = {"": "", "0": "", "1": "metadata", "metadata": "metadata", "exchange": "exchange"}
"""The meaning of each value of the variable; an empty string means nothing."""


def pcp_size_list(counts: Sequence[int], sequence_parallel_size: int, pcp_size: int, use_ep: int) -> list[int]:
    """Return the rows of each rank under prefill context parallelism, as `sp_local_sizes` of the class below."""
    pcp = check_int("pcp_size", pcp_size, 1, MAX_RANKS // len(counts))
    if use_ep:
        return sp_sizes([count for count in counts for _ in range(pcp)], sequence_parallel_size)
    multiplied = check_counts([count * pcp for count in counts], "num_tokens_across_dp times pcp_size")
    return sp_sizes(multiplied, sequence_parallel_size)


@dataclass(init=False, eq=False, repr=False)
class DPMetadata(HoldsCounts):
    """vLLM's class surface on Lockstep's arithmetic; the documentation of `lockstep.DPMetadata` applies."""

    num_tokens_across_dp_cpu: torch.Tensor
    local_sizes: list[int] | None = field(default=None, init=False)

    def __init__(self, num_tokens_across_dp_cpu: TokenCounts, local_sizes: list[int] | None = None) -> None:
        """Make the metadata from the tokens per DP rank, `[dp_size]`; leave `local_sizes` out."""
        read_fields(self, num_tokens_across_dp_cpu, local_sizes=local_sizes)

    @staticmethod
    def make(parallel_config: Any, num_tokens: int, num_tokens_across_dp_cpu: TokenCounts) -> "DPMetadata":
        """Make the metadata of this step from vLLM's config and the tokens per DP rank, `[data_parallel_size]`.

        Errors are those of `lockstep.DPMetadata.make`, and `ConfigurationError` for a model without experts, or one DP
        rank without sequence-parallel experts, which needs no sizes.
        """
        step = read_counts(num_tokens_across_dp_cpu)
        dp_rank = check_own_count(parallel_config, num_tokens, step.counts)
        if parallel_config.is_moe_model is False:
            raise ConfigurationError("is_moe_model must not be False: only experts exchange tokens between DP ranks")
        if len(step.counts) == 1 and not parallel_config.use_sequence_parallel_moe:
            raise ConfigurationError("data_parallel_size must be > 1 unless use_sequence_parallel_moe is set, got 1")
        metadata = object.__new__(DPMetadata)
        set_counts(metadata, step, dp_rank)
        return metadata

    def sp_local_sizes(self, sequence_parallel_size: int, pcp_size: int = NO_PCP, use_ep: bool = False) -> SizesContext:
        """Set `local_sizes` to the rows of the whole step in a `with` block, `[dp_size * sequence_parallel_size]`.

        With `use_ep` each of `pcp_size` prefill-context-parallel ranks has its own size, the count of its DP rank;
        otherwise the experts treat the tokens of these ranks as one rank's.
        """
        if pcp_size is not NO_PCP:
            sizes = find_sizes(self, pcp_size_list, sequence_parallel_size, pcp_size, int(bool(use_ep)))
            return sizes_context(self, sizes)
        # Repeats lockstep.DPMetadata.sp_local_sizes: calling it would add 14 ns to 219 in each layer.
        context = self._resting
        if (
            context.key is not sequence_parallel_size
            or context.memory != context.expected
            or context.shown is not self.num_tokens_across_dp_cpu
            or getrefcount(context) != UNSHARED
        ):
            context = step_context(self, sequence_parallel_size)
        else:
            self._resting = NO_CONTEXT
        context.metadata = self
        return context

    # The same functions as in lockstep.DPMetadata: they need only `HoldsCounts`.
    chunked_sizes = dp_metadata.DPMetadata.chunked_sizes
    get_chunk_sizes_across_dp_rank = dp_metadata.DPMetadata.get_chunk_sizes_across_dp_rank
    cu_tokens_across_sp = dp_metadata.DPMetadata.cu_tokens_across_sp


TOLD: set[str] = set()  # once-only lines that this process has logged


def tell(text: str, level: int) -> None:
    """Log a line once per process."""
    if text not in TOLD:
        TOLD.add(text)
        logger.log(level, text)


def register(environment: Mapping[str, str] = os.environ) -> None:
    """Apply the mode in the environment, see `MODES`; vLLM calls this plugin in each of its processes.

    Logs one line: INFO if it takes effect, else a warning that says why not (such as an unknown version of vLLM), and
    nothing changes. Running it again changes nothing; an unknown value is a `ConfigurationError`.
    """
    switch = environment.get(SWITCH, "")
    if switch not in MODES:
        values = ", ".join(value for value in MODES if value)
        raise ConfigurationError(f"{SWITCH} must be one of {values}, or not set, got {switch!r}")
    if MODES[switch] and (obstacle := _take_effect(MODES[switch])):
        tell(f"{SWITCH}={switch} changes nothing: {obstacle}", logging.WARNING)


def _take_effect(mode: str) -> str:
    """Return why the requested mode leaves this vLLM unchanged, or an empty string."""
    try:
        version = str(importlib.import_module("vllm").__version__)
    except (ImportError, AttributeError) as error:
        return f"vLLM cannot be imported ({error})"
    known = KNOWN_VERSIONS
    if mode == "exchange":  # imported only on request: it needs more of vLLM than the class does
        from lockstep.integrations import vllm_exchange

        known = vllm_exchange.KNOWN_VERSIONS
    release = re.match(r"\d+\.\d+", version)
    if release is None or release[0] not in known:
        return f"vLLM {version} is not among the versions known, {', '.join(known)}"
    return vllm_exchange.register_method() if mode == "exchange" else _replace_everywhere(version)


def _replace_everywhere(version: str) -> str:
    """Replace vLLM's class in every module that imported it, under any name; return why not, or an empty string."""
    try:
        theirs = importlib.import_module("vllm.forward_context").DPMetadata
    except (ImportError, AttributeError) as error:
        return f"vLLM's DPMetadata cannot be imported ({error})"
    if theirs is DPMetadata:
        return ""
    difference = surface_difference(theirs)
    if difference:
        return f"vLLM {version} has another DPMetadata than the one known: {difference}"
    replaced = []
    for module in [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]:
        for name in [name for name, value in vars(module).items() if value is theirs]:
            setattr(module, name, DPMetadata)
            replaced.append(f"{module.__name__}.{name}")
    logger.info("%s: DPMetadata of vLLM %s replaced in %d places", SWITCH, version, len(replaced))
    logger.debug("%s: replaced %s", SWITCH, ", ".join(sorted(replaced)))
    return ""


def surface_difference(theirs: Any) -> str:
    """Return the function whose parameters differ between vLLM's class and ours, or an empty string."""
    # Not chunked_sizes, which vLLM has dropped and ours keeps.
    for name in ("__init__", "make", "sp_local_sizes", "get_chunk_sizes_across_dp_rank", "cu_tokens_across_sp"):
        function = getattr(theirs, name, None)
        if function is None:
            return f"it has no {name}"
        expected, found = (list(inspect.signature(each).parameters) for each in (getattr(DPMetadata, name), function))
        if expected != found:
            return f"{name} takes {', '.join(found)} instead of {', '.join(expected)}"
    return ""
