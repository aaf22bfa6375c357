# vLLM's experts on our exchange, on a CPU: what is counted, masked, chunked, refused and registered. A stand-in package
# has the surface of vLLM that `SYMBOLS` and `RUNNERS` name. `test_vllm_sources.py` tries vLLM's own classes.

import importlib
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from lockstep.coordination.board import Board
from lockstep.dispatch.base import ExpertsShape, Route
from lockstep.errors import ConfigurationError, RankAbsentError, TokenCountError
from lockstep.integrations import vllm as plugin
from lockstep.integrations import vllm_exchange
from lockstep.integrations.vllm_exchange import LayerWeights
from lockstep.integrations.vllm_step import START_DEADLINE_S, Exchange, Step, Watch
from lockstep.moe.experts import LocalExperts
from lockstep.moe.reference import moe_reference

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 16, 8, 4, 2


class OwnRowsDispatcher:
    """A world of one rank: what this rank's tokens become, and what its padding becomes: nothing that is a number."""

    def __init__(self, capacity):
        self.max_tokens_per_rank, self.top_k, self.num_experts = capacity, TOP_K, EXPERTS
        self.calls, self.cells, self.deadlines, self.absent = [], [], [], None

    deadline_s = property(fset=lambda self, deadline_s: self.deadlines.append(deadline_s))

    def check(self):
        if self.absent is not None:
            raise RankAbsentError(f"rank {self.absent} did not come within 30 s; rank 0 gave up first", (self.absent,))

    def route(self, sizes):
        return Route("one rank", tuple(sizes), self.max_tokens_per_rank, captures=True)

    def dispatch(self, route, rows, topk_ids, topk_weights, num_tokens):
        assert max(route.sizes) <= route.chunk_size
        assert rows.shape[0] <= self.max_tokens_per_rank
        assert num_tokens.dtype is torch.int32
        assert num_tokens.shape == (1,)
        count = int(num_tokens)
        assert 0 <= count <= rows.shape[0]
        self.calls.append((rows.shape[0], count))
        self.cells.append(num_tokens.data_ptr())
        expert = topk_ids[:count].reshape(-1)
        order = torch.argsort(expert, stable=True)
        offsets = torch.zeros(EXPERTS + 1, dtype=torch.int32)
        offsets[1:] = torch.bincount(expert, minlength=EXPERTS).cumsum(0)
        return SimpleNamespace(
            hidden_states=rows,
            gather_index=(order // TOP_K).to(torch.int32),
            pair_weights=topk_weights[:count].reshape(-1)[order],
            expert_offsets=offsets,
            scales=None,
        )

    def combine(self, expert_output, handle):
        num_rows = handle.hidden_states.shape[0]
        weighted = expert_output.float() * handle.pair_weights[:, None]
        output = torch.zeros(num_rows, HIDDEN).index_add_(0, handle.gather_index.long(), weighted)
        taken = torch.zeros(num_rows, dtype=torch.bool)
        taken[handle.gather_index.long()] = True
        output[~taken] = float("nan")
        return output.to(expert_output.dtype)


class OnDevice(LocalExperts):
    """Experts that compute what the GPU's kernels do."""

    def __init__(self, layer):
        super().__init__(LayerWeights(layer))
        self.layer, self.asked_for = layer, []

    def on_device(self, hidden_states, scales, gather_index, expert_offsets, rows_per_expert):
        assert scales is None
        self.asked_for.append(rows_per_expert)
        return self(hidden_states, gather_index.long(), expert_offsets.diff().long())


@pytest.fixture
def experts():
    generator = torch.Generator().manual_seed(0)
    layer = SimpleNamespace(
        w13_weight=torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator).to(torch.bfloat16),
        w2_weight=torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator).to(torch.bfloat16),
    )
    return OnDevice(layer)


def routed(num_rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, HIDDEN, generator=generator).to(torch.bfloat16)
    ids = torch.rand(num_rows, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].to(torch.int32)
    weights = torch.rand(num_rows, TOP_K, generator=generator)
    return rows, ids, weights


def expected(experts, rows, ids, weights):
    layer = experts.layer
    (output,) = moe_reference([rows.float()], [ids], [weights], layer.w13_weight.float(), layer.w2_weight.float())
    return output


def step_of(num_tokens, cell=True):
    step = Step()
    step.cell = torch.zeros(1, dtype=torch.int32) if cell else None
    step.begin(num_tokens)
    return step


def check(output, experts, rows, ids, weights, num_tokens):
    wanted = expected(experts, rows, ids, weights)[:num_tokens]
    tolerance = 0.02 * max(1.0, *wanted.abs().flatten().tolist(), 1.0)
    assert torch.allclose(output[:num_tokens].float(), wanted, rtol=0.0, atol=tolerance)
    # Padding went nowhere: had it been computed, there would be numbers.
    assert torch.isnan(output[num_tokens:].float()).all()


# Rows.


@pytest.mark.parametrize(("num_rows", "num_tokens"), [(8, 8), (8, 3), (8, 0), (1, 1), (1, 0)])
def test_only_tokens_are_sent_and_computed(experts, num_rows, num_tokens):
    decode, prompt = OwnRowsDispatcher(8), OwnRowsDispatcher(32)
    rows, ids, weights = routed(num_rows)
    output = Exchange(decode, prompt, rank=1).run(step_of(num_tokens), experts, rows, ids, weights, [8, num_rows, 1])
    assert decode.calls == [(num_rows, num_tokens)]
    assert not prompt.calls
    check(output, experts, rows, ids, weights, num_tokens)


@pytest.mark.parametrize("num_tokens", [0, 5, 8, 9, 16, 17, 20])
def test_large_steps_go_in_chunks_that_all_ranks_know(experts, num_tokens):
    decode, prompt = OwnRowsDispatcher(4), OwnRowsDispatcher(8)
    rows, ids, weights = routed(20)
    output = Exchange(decode, prompt).run(step_of(num_tokens), experts, rows, ids, weights, [20, 27])
    # Another rank has 27 rows, so there are four chunks; this one's tokens come first.
    expected_calls = [
        (8, min(8, num_tokens)),
        (8, min(8, max(0, num_tokens - 8))),
        (4, max(0, num_tokens - 16)),
        (0, 0),
    ]
    assert prompt.calls == expected_calls
    assert not decode.calls
    check(output, experts, rows, ids, weights, num_tokens)
    assert experts.asked_for == [16 * TOP_K / EXPERTS] * 2 + [12 * TOP_K / EXPERTS, 3 * TOP_K / EXPERTS]


def test_the_same_buffers_are_taken_by_a_rank_without_rows(experts):
    decode, prompt = OwnRowsDispatcher(4), OwnRowsDispatcher(8)
    rows, ids, weights = routed(1)
    Exchange(decode, prompt).run(step_of(0), experts, rows, ids, weights, [1, 20])
    assert prompt.calls == [(1, 0), (0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("num_tokens", "of_each_rank"), [(7, [4, 3]), (4, [4, 0]), (8, [4, 4]), (1, [1, 0]), (0, [0, 0])]
)
def test_sequence_parallel_ranks_share_the_tokens_in_order(experts, num_tokens, of_each_rank):
    for sp_rank, tokens in enumerate(of_each_rank):
        decode = OwnRowsDispatcher(8)
        rows, ids, weights = routed(4)
        exchange = Exchange(decode, decode, sp_size=2, rank=sp_rank)
        output = exchange.run(step_of(num_tokens), experts, rows, ids, weights, [8, 8])
        assert decode.calls == [(4, tokens)]
        check(output, experts, rows, ids, weights, tokens)


@pytest.mark.parametrize(("num_tokens", "of_each_chunk"), [(13, [3, 0, 0]), (19, [4, 4, 1])])
def test_sequence_parallel_chunks(experts, num_tokens, of_each_chunk):
    decode, prompt = OwnRowsDispatcher(2), OwnRowsDispatcher(4)
    rows, ids, weights = routed(10)  # of 20, of which the tokens come first
    Exchange(decode, prompt, sp_size=2, rank=1).run(step_of(num_tokens), experts, rows, ids, weights, [20])
    assert prompt.calls == list(zip([4, 4, 2], of_each_chunk, strict=True))


@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "counts", "rank", "sp_size"),
    [
        (8, 3, [8, 4], 1, 1),  # the other ranks expect 4 rows
        (8, 3, [4, 16], 1, 1),
        (4, 5, [4, 4], 0, 1),  # more tokens than rows
        (4, 9, [8, 8], 1, 2),
        (5, 8, [8, 8], 3, 2),
    ],
)
def test_counts_that_differ_from_what_all_ranks_agreed_on_are_found_before_rows_move(
    experts, num_rows, num_tokens, counts, rank, sp_size
):
    decode = OwnRowsDispatcher(16)
    exchange = Exchange(decode, decode, rank=rank, sp_size=sp_size)
    with pytest.raises(TokenCountError, match=rf"EP rank {rank} has {num_rows} rows for {num_tokens} tokens .* are \["):
        exchange.run(step_of(num_tokens), experts, *routed(num_rows), counts)
    assert decode.calls == []


def test_the_count_that_a_graph_reads_stays_where_it_is(experts):
    step = step_of(3)
    where = step.cell.data_ptr()
    decode = OwnRowsDispatcher(8)
    Exchange(decode, decode).run(step, experts, *routed(8), [8])
    assert decode.cells == [where]
    step.begin(5)
    assert step.cell.data_ptr() == where
    assert int(step.cell) == 5


def test_weights_that_vllm_replaces_are_read_anew(experts):
    decode = OwnRowsDispatcher(8)
    rows, ids, weights = routed(4)
    experts.layer.w2_weight = experts.layer.w2_weight * 2
    output = Exchange(decode, decode).run(step_of(4), experts, rows, ids, weights, [4, 4])
    check(output, experts, rows, ids, weights, 4)


def test_the_deadline_is_long_until_requests_are_served(experts):
    decode = OwnRowsDispatcher(8)
    exchange, step = Exchange(decode, decode, deadline_s=20.0), step_of(0)
    for num_tokens in (0, 4, 0):
        step.begin(num_tokens)
        exchange.run(step, experts, *routed(4), [4, 4])
    assert decode.deadlines == [START_DEADLINE_S, 20.0, 20.0]


def test_a_missing_rank_is_named_in_error_and_log(experts, caplog):
    plugin.TOLD.clear()
    decode = OwnRowsDispatcher(8)
    step = step_of(4)
    step.exchanges[ExpertsShape(EXPERTS, HIDDEN, TOP_K)] = Exchange(decode, decode)
    step.check()
    decode.absent = 2
    for call in (step.check, lambda: step.begin(4)):
        with pytest.raises(RankAbsentError, match="rank 2 did not come within 30 s"):
            call()
    assert {record.getMessage() for record in caplog.records} == {
        "LOCKSTEP_VLLM=exchange: rank 2 did not come within 30 s; rank 0 gave up first"
    }


@pytest.mark.parametrize(("text", "seconds"), [(None, 30.0), ("12", 12.0), ("0.5", 0.5)])
def test_the_deadline_comes_from_the_environment(text, seconds):
    assert vllm_exchange.deadline_s({"LOCKSTEP_VLLM_DEADLINE_S": text} if text else {}) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "soon", "nan", "inf"])
def test_a_wrong_deadline_is_refused(text):
    with pytest.raises(ConfigurationError, match=f"DEADLINE_S must be a number of seconds above 0, got '{text}'"):
        vllm_exchange.deadline_s({"LOCKSTEP_VLLM_DEADLINE_S": text})


@pytest.fixture
def board():
    board = Board.create(3)
    board.unlink()
    return board


def watch_of(step, board, silent_s, deadline_s=5.0, **options):
    """Rank 1 of three; the others were last heard of so many seconds ago."""
    for rank in (0, 2):
        board.write_place(rank, 1, time.monotonic_ns() - int(silent_s[rank] * 1e9))
    return Watch(step, board, 1, deadline_s, **options)


@pytest.mark.parametrize(
    ("silent_s", "in_step_for", "serving", "silent"),
    [
        ((0.1, 0, 0.2), 60.0, True, []),  # slow, but everybody is alive
        ((0.1, 0, 9.0), 60.0, True, [2]),
        ((9.0, 0, 9.0), 60.0, True, [0, 2]),
        ((0.1, 0, 9.0), 1.0, True, []),  # not long enough in this step
        ((0.1, 0, 9.0), None, True, []),  # between steps
        ((0.1, 0, 9.0), 60.0, False, []),  # while kernels are compiled
    ],
)
def test_a_rank_that_is_silent_during_a_step_is_noticed(board, silent_s, in_step_for, serving, silent):
    step = step_of(0)
    step.serving = serving
    if in_step_for is not None:
        step.calls = {"a step": time.monotonic() - in_step_for, "the one before": time.monotonic()}
    watch = watch_of(step, board, silent_s)
    assert watch.silent_ranks() == silent
    named = ", ".join(f"EP rank {rank}" for rank in silent)
    assert watch.look() == (f"silent for 5 s while EP rank 1 is in a step: {named}" if silent else "")


def test_a_worker_that_cannot_be_called_off_is_ended_after_the_rank_is_named(board, caplog):
    plugin.TOLD.clear()
    step, ended = step_of(4), threading.Event()
    stops = {"end": lambda status: ended.set(), "period_s": 0.01, "grace_s": 0.05}
    watch = watch_of(step, board, (0.0, 0.0, 9.0), deadline_s=0.2, **stops)
    watch.start()
    time.sleep(0.4)
    assert not ended.is_set()  # no step is under way
    board.write_place(0, 1, time.monotonic_ns() + 10**12)
    step.within(ended.wait, 10.0)
    assert ended.is_set()
    assert "silent for 0.2 s while EP rank 1 is in a step: EP rank 2" in caplog.text


def test_a_rank_that_has_never_beaten_is_not_silent(board):
    step = step_of(4)
    step.calls = {"a step": time.monotonic() - 60.0}
    assert Watch(step, board, 1, 5.0).look() == ""


def test_an_idle_rank_learns_that_requests_are_served(board):
    idle, busy = step_of(0), step_of(4)
    watch = Watch(idle, board, 0, 5.0)
    assert not idle.serving
    Watch(busy, board, 1, 5.0)
    watch.beat()
    assert idle.serving


def test_a_call_that_fails_is_over_too():
    step = step_of(4)
    with pytest.raises(ZeroDivisionError):
        step.within(lambda: 1 / 0)
    assert step.within(lambda: len(step.calls)) == 1
    assert step.calls == {}


def test_a_kernels_verdict_ends_a_worker_that_waits_elsewhere(board):
    step, decode = step_of(4), OwnRowsDispatcher(8)
    step.exchanges[ExpertsShape(EXPERTS, HIDDEN, TOP_K)] = Exchange(decode, decode)
    watch = watch_of(step, board, (0, 0, 0))
    assert watch.look() == ""
    decode.absent = 2
    assert "rank 2 did not come" in watch.look()


# What is refused.


def configuration(**changes):
    """vLLM's configuration and a layer's, as far as they are read; `changes` by the name of the attribute."""
    experts = SimpleNamespace(
        use_ep=True,
        dp_size=4,
        pcp_size=1,
        ep_size=4,
        ep_rank=1,
        sp_size=1,
        is_sequence_parallel=False,
        enable_eplb=False,
    )
    moe = SimpleNamespace(
        moe_parallel_config=experts, activation=SimpleNamespace(value="silu"), in_dtype=torch.bfloat16, has_bias=False,
        is_lora_enabled=False, swiglu_limit=None, swiglu_alpha=None, swiglu_beta=None, num_experts=128, hidden_dim=2048,
        hidden_dim_unpadded=2048, intermediate_pad=None, experts_per_token=8, max_num_tokens=16384,
        max_capture_size=256,
    )  # fmt: skip
    parallel = SimpleNamespace(
        tensor_parallel_size=1, pipeline_parallel_size=1, enable_elastic_ep=False, enable_dbo=False, ubatch_size=0,
        expert_placement_strategy="linear",
    )  # fmt: skip
    config = SimpleNamespace(
        parallel_config=parallel,
        speculative_config=None,
        lora_config=None,
        model_config=SimpleNamespace(enable_sleep_mode=False),
    )
    method = SimpleNamespace(unquantized_backend=SimpleNamespace(name="TRITON"))
    for name, value in changes.items():
        owners = [each for each in (experts, moe, parallel, config, config.model_config, method) if hasattr(each, name)]
        assert len(owners) == 1, name
        setattr(owners[0], name, value)
    return config, moe, method


def test_a_plain_model_under_data_and_expert_parallelism_is_supported():
    assert vllm_exchange.unsupported(*configuration()) == ""
    assert vllm_exchange.unsupported(*configuration(tensor_parallel_size=2, is_sequence_parallel=True)) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_ep": False}, "expert parallelism is off"),
        ({"dp_size": 1}, "data_parallel_size is 1"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size > 1 without sequence-parallel experts"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size > 1"),
        ({"pcp_size": 2}, "prefill_context_parallel_size > 1"),
        ({"enable_eplb": True}, "EPLB"),
        ({"enable_elastic_ep": True}, "enable_elastic_ep"),
        ({"enable_dbo": True}, "enable_dbo"),
        ({"ubatch_size": 2}, "ubatch_size"),
        ({"expert_placement_strategy": "round_robin"}, "expert placement 'round_robin'"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": object()}, "LoRA"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"enable_sleep_mode": True}, "sleep mode"),
        ({"in_dtype": torch.float16}, "dtype torch.float16; only bfloat16 travels"),
        ({"has_bias": True}, "biases"),
        ({"activation": SimpleNamespace(value="gelu")}, "activation 'gelu'"),
        ({"swiglu_limit": 7.0}, "clamped or scaled SwiGLU"),
        ({"num_experts": 126}, "126 experts on 4 ranks"),
        ({"hidden_dim": 2304}, "padded rows"),
        ({"intermediate_pad": 32}, "padded experts"),
        ({"unquantized_backend": SimpleNamespace(name="FLASHINFER_CUTLASS")}, "backend FLASHINFER_CUTLASS"),
    ],
)
def test_what_is_not_supported_is_named(changes, reason):
    assert reason in vllm_exchange.unsupported(*configuration(**changes))


def test_several_reasons_are_all_named():
    reasons = vllm_exchange.unsupported(*configuration(enable_eplb=True, has_bias=True))
    assert "EPLB" in reasons and "biases" in reasons


# Registration, on a stand-in with the names that are relied upon.

STAND_IN = {
    "__init__": "__version__ = '0.33.0'\n",
    "config": """
        CURRENT = None

        def get_current_vllm_config():
            return CURRENT
    """,
    "forward_context": """
        from types import SimpleNamespace
        import torch
        COUNTS = None

        def is_forward_context_available():
            return COUNTS is not None

        def get_forward_context():
            return SimpleNamespace(dp_metadata=SimpleNamespace(num_tokens_across_dp_cpu=torch.tensor(COUNTS)))
    """,
    "distributed/__init__": "",
    "distributed/parallel_state": """
        GROUP = None

        def get_ep_group():
            return GROUP
    """,
    "model_executor/__init__": "",
    "model_executor/layers/__init__": "",
    "model_executor/layers/fused_moe/__init__": "",
    "model_executor/custom_op": """
        op_registry_oot = {}

        class CustomOp:
            def __new__(cls, *args, **kwargs):
                return super().__new__(op_registry_oot.get(cls.__name__, cls))

            @classmethod
            def register_oot(cls, op_cls):
                assert cls.__name__ not in op_registry_oot
                op_registry_oot[cls.__name__] = op_cls
                return op_cls
    """,
    "model_executor/layers/fused_moe/unquantized_fused_moe_method": """
        from types import SimpleNamespace
        from vllm.model_executor.custom_op import CustomOp

        class UnquantizedFusedMoEMethod(CustomOp):
            def __init__(self, moe):
                self.moe = moe
                self.unquantized_backend = SimpleNamespace(name="TRITON")
                self.processed = 0

            @property
            def mk_can_overlap_shared_experts(self):
                return True

            def process_weights_after_loading(self, layer):
                self.processed += 1

            def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
                return "vLLM's own"
    """,
    "v1/__init__": "",
    "v1/worker/__init__": "",
    "v1/worker/gpu_model_runner": """
        from types import SimpleNamespace

        class AsyncGPUModelRunnerOutput:
            def get_output(self):
                return "tokens"

        class GPUModelRunner:
            def execute_model(self, scheduler_output, intermediate_tensors=None):
                return None

            def _dummy_run(self, num_tokens, **options):
                return num_tokens

            def sample_tokens(self, grammar_output):
                return AsyncGPUModelRunnerOutput() if grammar_output else SimpleNamespace(sampled_token_ids=[[1]])
    """,
}


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    for name, text in STAND_IN.items():
        path = tmp_path / "vllm" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            del sys.modules[name]
        plugin.TOLD.clear()

    if "vllm" in sys.modules:
        pytest.skip("vLLM itself has been imported")
    forget()
    monkeypatch.syspath_prepend(tmp_path)
    vars(vllm_exchange.STEP).update(vars(Step()))
    yield lambda name: importlib.import_module(f"vllm.{name}")
    forget()


def method_of(vllm, moe):
    return vllm("model_executor.layers.fused_moe.unquantized_fused_moe_method").UnquantizedFusedMoEMethod(moe)


@pytest.fixture
def joined(vllm, experts):
    """The method after it has loaded a layer's weights, and joined an exchange of a world of one rank."""
    _, moe, _ = configuration(
        num_experts=EXPERTS, hidden_dim=HIDDEN, hidden_dim_unpadded=HIDDEN, experts_per_token=TOP_K
    )
    vllm("v1.worker.gpu_model_runner")
    assert vllm_exchange.watch_runners()
    decode, step, asked = OwnRowsDispatcher(8), vllm_exchange.STEP, []
    step.cell = torch.zeros(1, dtype=torch.int32)
    exchange = step.exchanges[ExpertsShape(EXPERTS, HIDDEN, TOP_K)] = Exchange(decode, decode)

    def join(config, moe, method, layer):
        asked.append(layer)
        return lambda *rows: exchange.run(step, experts, *rows)

    assert vllm_exchange.register_method(join) == ""
    method = method_of(vllm, moe)
    layer = SimpleNamespace(**vars(experts.layer), apply_router_weight_on_input=False)
    method.process_weights_after_loading(layer)
    return SimpleNamespace(method=method, layer=layer, asked=asked, decode=decode, vllm=vllm, moe=moe)


def test_vllm_makes_our_method_where_it_would_make_its_own(vllm, caplog):
    plugin.register({"LOCKSTEP_VLLM": "exchange"})
    plugin.register({"LOCKSTEP_VLLM": "exchange"})
    assert type(method_of(vllm, object())).__name__ == "LockstepFusedMoEMethod"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_another_plugins_method_is_left_alone(vllm, caplog):
    base = vllm("model_executor.layers.fused_moe.unquantized_fused_moe_method").UnquantizedFusedMoEMethod
    base.register_oot(type("Theirs", (base,), {}))
    plugin.register({"LOCKSTEP_VLLM": "exchange"})
    (record,) = caplog.records
    assert "another plugin has put Theirs in the place of vLLM's UnquantizedFusedMoEMethod" in record.getMessage()


@pytest.mark.parametrize(
    ("module", "name", "missing"),
    [
        ("forward_context", "get_forward_context", "vllm.forward_context has no get_forward_context"),
        ("distributed.parallel_state", "get_ep_group", "vllm.distributed.parallel_state has no get_ep_group"),
        ("config", "get_current_vllm_config", "vllm.config has no get_current_vllm_config"),
    ],
)
def test_a_vllm_that_lacks_what_we_rely_on_is_left_alone(vllm, caplog, module, name, missing):
    delattr(vllm(module), name)
    plugin.register({"LOCKSTEP_VLLM": "exchange"})
    (record,) = caplog.records
    assert record.getMessage() == f"LOCKSTEP_VLLM=exchange changes nothing: {missing}"
    assert type(method_of(vllm, object())).__name__ == "UnquantizedFusedMoEMethod"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_ep": False}, "expert parallelism is off"),
        ({"dp_size": 1}, "data_parallel_size is 1"),
        ({"enable_elastic_ep": True}, "ranks come and go"),
    ],
)
def test_without_a_fixed_group_to_ask_vllm_runs_as_without_us_and_one_line_says_why(vllm, caplog, changes, reason):
    config, moe, _ = configuration(**changes)
    vllm("config").CURRENT = config
    plugin.register({"LOCKSTEP_VLLM": "exchange"})
    for _ in range(3):
        method = method_of(vllm, moe)
        method.process_weights_after_loading(SimpleNamespace(w2_weight=torch.zeros(1), w13_weight=torch.zeros(1)))
        assert method.processed == 1
        assert method.mk_can_overlap_shared_experts
        assert method.apply(SimpleNamespace(), None, None, None, None, None) == "vLLM's own"
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage().startswith(f"LOCKSTEP_VLLM=exchange: vLLM's own path stays: {reason}")


def test_a_layer_joins_once_however_often_its_weights_are_loaded(joined):
    joined.method.process_weights_after_loading(joined.layer)
    assert joined.method.processed == 2
    assert joined.asked == [joined.layer]


def test_a_layer_runs_through_the_exchange_with_the_steps_real_rows(joined, experts):
    runner = joined.vllm("v1.worker.gpu_model_runner").GPUModelRunner()
    joined.vllm("forward_context").COUNTS = [8, 8, 8, 8]
    rows, ids, weights = routed(8)
    dispatcher = joined.decode
    runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=3))
    output = joined.method.apply(joined.layer, rows, weights, ids, None, None)
    check(output, experts, rows, ids, weights, 3)
    runner._dummy_run(1, uniform_decode=True)
    joined.method.apply(joined.layer, rows, weights, ids, None, None)
    assert dispatcher.calls == [(8, 3), (8, 0)]
    assert not joined.method.mk_can_overlap_shared_experts


def test_the_newer_runners_dummy_runs_have_no_rows(joined):
    runner = joined.vllm("v1.worker.gpu_model_runner").GPUModelRunner
    vllm_exchange.watch(runner)  # once more changes nothing

    class Newer:
        def execute_model(self, scheduler_output, dummy_run=False):
            return dummy_run

        def _dummy_run(self, num_tokens):
            return self.execute_model(SimpleNamespace(total_num_scheduled_tokens=num_tokens), dummy_run=True)

        def sample_tokens(self, grammar_output):
            return None

    vllm_exchange.watch(Newer)
    step = vllm_exchange.STEP
    Newer().execute_model(SimpleNamespace(total_num_scheduled_tokens=5))
    assert (step.num_tokens, int(step.cell)) == (5, 5)
    assert Newer()._dummy_run(7) is True
    assert (step.num_tokens, int(step.cell)) == (0, 0)


def test_tokens_of_a_step_that_failed_do_not_leave_the_worker(joined):
    module = joined.vllm("v1.worker.gpu_model_runner")
    runner = module.GPUModelRunner()
    assert runner.sample_tokens("grammar").get_output() == "tokens"
    joined.decode.absent = 3
    for call in (
        lambda: runner.sample_tokens(None),
        lambda: runner.sample_tokens("grammar").get_output(),
        lambda: runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=1)),
        lambda: runner._dummy_run(1),
    ):
        with pytest.raises(RankAbsentError, match="rank 3 did not come"):
            call()


def test_router_weights_on_the_input_stay_with_vllm(joined):
    joined.layer.apply_router_weight_on_input = True
    assert joined.method.apply(joined.layer, *routed(2), None, None) == "vLLM's own"


def test_without_counts_of_all_ranks_a_layer_says_so(joined):
    with pytest.raises(ConfigurationError, match="needs the token counts of all ranks"):
        joined.method.apply(joined.layer, *routed(2), None, None)


# Agreement of ranks; that of real ones is in tests/ranks/test_vllm_ranks.py.


def answer(gpu=0, host="host", no="", **alike):
    return {"no": no, "maps": [host, f"GPU-{gpu}"], "alike": {"the experts": [128, 2048, 8], **alike}}


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([answer(), answer(1)], ""),
        ([answer(), answer(1, no="an old GPU")], "an old GPU (on EP rank 1)"),
        ([answer(), answer(1, host="other")], "cannot map each other's memory"),
        ([answer() | {"maps": None}, answer(1)], "cannot map each other's memory"),
        (
            [answer(rows=[256, 4096]), answer(1, rows=[256, 2048])],
            "ranks disagree about rows: EP rank 0: [256, 4096], EP rank 1: [256, 2048]",
        ),
        ([answer(sp_size=1), answer(1)], "ranks disagree about sp_size: EP rank 0: 1, EP rank 1: None"),
    ],
)
def test_all_ranks_take_one_way(answers, reason):
    found = vllm_exchange.disagreement(answers)
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("max_num_tokens", "max_capture_size", "sp_size", "rows"),
    [(16384, 256, 1, (256, 4096)), (2048, 512, 1, (512, 2048)), (128, 512, 1, (128, 128)), (8192, 0, 4, (256, 2048))],
)
def test_buffers_are_as_large_as_graphs_and_steps(max_num_tokens, max_capture_size, sp_size, rows):
    changes = {"max_num_tokens": max_num_tokens, "max_capture_size": max_capture_size, "sp_size": sp_size}
    assert vllm_exchange.capacities(configuration(**changes)[1]) == rows
