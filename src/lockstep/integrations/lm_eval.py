"""lm-evaluation-harness over all ranks: `torchrun ... -m lockstep.integrations.lm_eval run --model lockstep ...`."""

import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import lockstep
from lockstep.errors import RankMismatchError

_OF_THE_HARNESS = (
    "add_bos_token", "backend", "batch_size", "chat_template_args", "enable_thinking", "logits_cache",
    "max_batch_size", "max_length", "prefix_token_id", "softmax_dtype", "think_end_token", "tokenizer", "truncation",
    "use_fast_tokenizer",
)  # fmt: skip
"""`--model_args` for the harness' own model class; all other arguments go to `lockstep.from_pretrained`."""


@register_model("lockstep")
class LockstepLM(HFLM):
    """The harness' Hugging Face model, spread over the ranks; documents are divided among them.

    Every rank sees all requests, runs those of its own documents inside `join`, and gets all ranks' answers: metrics
    equal those of one process, and no request runs twice. `kwargs` go to `HFLM` and `lockstep.from_pretrained`.
    """

    def __init__(self, pretrained: str, peft: str | None = None, **kwargs: Any) -> None:
        of_harness = {name: kwargs.pop(name) for name in _OF_THE_HARNESS if name in kwargs}
        if kwargs.get("device") == "cuda:0":  # the harness' default, but each rank has its own
            del kwargs["device"]
        model: Any = lockstep.from_pretrained(pretrained, **kwargs)
        if peft is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, peft)
        of_harness.setdefault("tokenizer", pretrained)  # the harness loads it from the same folder
        super().__init__(model, trust_remote_code=kwargs.get("trust_remote_code", False), **of_harness)
        self._parallel = lockstep.parallel_of(model)
        if self._parallel is not None and self._parallel.config.rank:
            # The harness reports where this variable is 0, which it is on the first process of every host.
            os.environ["LOCAL_RANK"] = str(self._parallel.config.rank)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `HFLM.loglikelihood`. Collective, like the next two."""
        return [(value, is_greedy) for value, is_greedy in self._divided(super().loglikelihood, requests, disable_tqdm)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """See `HFLM.loglikelihood_rolling`."""
        return self._divided(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """See `HFLM.generate_until`."""
        return self._divided(super().generate_until, requests, disable_tqdm)

    def _divided(self, run: Callable[..., list[Any]], requests: Sequence[Any], disable_tqdm: bool) -> list[Any]:
        """Run the requests of this rank's documents; return all ranks' answers, in the order of the requests."""
        parallel = self._parallel
        if parallel is None:
            return run(requests, disable_tqdm=disable_tqdm)
        config = parallel.config
        documents = dict.fromkeys(map(_document, requests))
        owner = {document: number % config.data_parallel_size for number, document in enumerate(documents)}
        owners = [owner[_document(request)] for request in requests]
        own = [request for request, rank in zip(requests, owners, strict=True) if rank == config.data_parallel_rank]
        with lockstep.join(self.model):
            answers = run(own, disable_tqdm=disable_tqdm or config.rank > 0) if own else []
            asked = zlib.crc32(repr([(_document(request), request.args) for request in requests]).encode())
        parts = parallel.gather_json([asked, answers])
        if len({part[0] for part in parts}) > 1:
            raise RankMismatchError(
                f"ranks were asked different requests (checksums {[part[0] for part in parts]}): give all of them the "
                "same tasks and seeds, and remove the files of --use_cache, which may hold other answers on each rank"
            )
        of_rank = [iter(part[1]) for part in parts[:: config.tensor_parallel_size]]
        return [next(of_rank[rank]) for rank in owners]


def _document(request: Any) -> tuple[str, int]:
    return request.task_name, request.doc_id


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
