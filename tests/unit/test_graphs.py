"""Which steps become CUDA graphs, and what of them is copied. CUDA itself is stood in for, so no GPU is needed."""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from lockstep.dispatch.base import Abilities, DispatchHandle, ExpertsShape, Route
from lockstep.metadata.config import ParallelConfig
from lockstep.models import generate_graphs as graphs
from lockstep.models.generate_graphs import StepGraphs
from lockstep.moe.layer import MoELayer
from lockstep.moe.layers import MoELayers


class Cuda:
    """In the place of `torch.cuda`: a graph runs again what was issued while it was captured, and counts."""

    def __init__(self):
        self.captures, self.replays, self.ended, self.fails = 0, 0, 0, False
        self.capturing = False
        self.alive = alive = weakref.WeakSet()
        cuda = self

        class Graph:
            def __init__(self):
                alive.add(self)

            def capture_begin(self, capture_error_mode):
                assert capture_error_mode == "thread_local"
                assert not cuda.capturing
                cuda.capturing = True
                cuda.captures += 1
                self.issued = []
                cuda.into = self.issued

            def capture_end(self):
                cuda.capturing = False
                cuda.ended += 1

            def replay(self):
                cuda.replays += 1
                for kernel in self.issued:
                    kernel()

        self.CUDAGraph = Graph
        self.Stream = self.current_stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.stream = lambda stream: contextlib.nullcontext()

    def launch(self, kernel):
        """Run what a GPU would run: at once, or, while capturing, only when the graph is replayed."""
        if self.capturing:
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.into.append(kernel)
        else:
            kernel()


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(graphs.torch, "cuda", cuda)
    return cuda


class Cache:
    """As much of Transformers' `StaticCache` as is asked for."""

    def __init__(self, initialized=True, compileable=True):
        self.is_compileable = compileable
        self.layers = [SimpleNamespace(is_initialized=True), SimpleNamespace(is_initialized=initialized)]


class Output(dict):
    """As much of Transformers' `ModelOutput` as is asked for."""

    def __init__(self, **values):
        super().__init__(values)


class Model:
    """Adds up ids and mask; like one on a GPU, it computes into tensors that it makes when it is called."""

    def __init__(self, cuda):
        self.cuda, self.calls, self.caches = cuda, 0, []

    def __call__(self, input_ids, past_key_values, attention_mask=None, scale=1):
        self.calls += 1
        self.caches.append(past_key_values)
        logits = torch.full(input_ids.shape, float("nan"))

        def kernel():
            logits.copy_(input_ids * scale + (0 if attention_mask is None else attention_mask.sum()))

        self.cuda.launch(kernel)
        return Output(logits=logits, past_key_values=past_key_values)


class Dispatcher:
    """Can be captured, if a step's rows fit; what it launches is counted when it runs."""

    name = "made up"
    abilities = Abilities((torch.bfloat16,))
    num_experts, num_local_experts = 8, 4

    def __init__(self, cuda, capacity):
        self.cuda, self.capacity, self.ran, self.forgotten = cuda, capacity, 0, 0

    def route(self, sizes, limit=None, *, capture=False):
        return Route(self.name, tuple(sizes), self.capacity, captures=max(sizes) <= self.capacity)

    def dispatch(self, route, hidden_states, topk_ids, topk_weights, num_tokens=None):
        def kernel():
            self.ran += 1

        self.cuda.launch(kernel)
        nothing = torch.zeros(0, dtype=torch.int32)
        return DispatchHandle(route, 0, hidden_states, None, nothing, nothing, nothing, nothing, 0)

    def combine(self, expert_output, handle):
        return expert_output

    def forget_capture(self):
        self.forgotten += 1


def make(cuda, capacity=4096, tensor_parallel_size=1):
    config = ParallelConfig(2, 0, tensor_parallel_size, 0)
    dispatcher = Dispatcher(cuda, capacity)
    shape = ExpertsShape(8, 64, 2, torch.bfloat16)
    layer = MoELayer(lambda rows, *_: rows, dispatcher, config, shape, tensor_parallel_group=object())
    layers = MoELayers([layer, layer])
    return Steps(layers), dispatcher, Model(cuda)


class Steps:
    """The graphs of a rank, each pass in a step of its own; rank 0 has 3 rows of 3 unless something else is said."""

    def __init__(self, layers):
        self.layers, self.graphs = layers, StepGraphs(layers)

    def begin(self, *counts):
        return self.layers.begin(counts or (3, 0))

    def run_forward(self, model, args, kwargs, counts=()):
        step = self.begin(*counts)
        output = self.graphs.run_forward(step, model, args, kwargs)
        assert step.next_layer == (0 if output is None else 2)  # what a graph has issued is not issued once more
        return output

    def run_idle(self, *counts):
        with self.begin(*(counts or (0, 3))) as step:
            self.graphs.run_idle(step)


def ids(*values):
    return torch.tensor(values)[:, None]


def test_a_step_is_captured_at_its_second_time_and_replayed_from_then_on(cuda):
    steps, _, model = make(cuda)
    cache = Cache()
    assert steps.run_forward(model, (), {"input_ids": ids(1, 2), "past_key_values": cache}) is None
    assert (model.calls, cuda.captures) == (0, 0)
    for number in (5, 7, 9):
        output = steps.run_forward(model, (), {"input_ids": ids(number, 2), "past_key_values": cache})
        assert output["logits"].tolist() == [[number], [2]]
        assert output["past_key_values"] is cache
    assert (model.calls, cuda.captures, cuda.replays) == (1, 1, 3)
    assert model.caches == [cache]


def test_inputs_are_copied_into_the_graphs_own_and_outputs_out_of_it(cuda):
    steps, _, model = make(cuda)
    cache, mask = Cache(), torch.ones(3)
    mine = ids(1, 2)
    kwargs = {"input_ids": mine, "past_key_values": cache, "attention_mask": mask}
    steps.run_forward(model, (), kwargs)
    first = steps.run_forward(model, (), kwargs)["logits"]
    assert first.tolist() == [[4], [5]]
    mine.fill_(100)  # the caller's own tensor, in place: the graph has another
    second = steps.run_forward(model, (), {**kwargs, "input_ids": ids(7, 8), "attention_mask": torch.zeros(3)})[
        "logits"
    ]
    assert second.tolist() == [[7], [8]]
    assert first.tolist() == [[4], [5]]  # not overwritten by the replay after it
    assert mine.tolist() == [[100], [100]]
    assert mask.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "other",
    [
        {"input_ids": ids(1, 2, 3)},
        {"input_ids": ids(1, 2).int()},
        {"scale": 2},
        {"attention_mask": torch.ones(2)},
        {"past_key_values": Cache()},
    ],
    ids=["more sequences", "another dtype", "another number", "one more tensor", "another cache"],
)
def test_a_step_of_another_kind_has_a_graph_of_its_own(cuda, other):
    steps, _, model = make(cuda)
    kwargs = {"input_ids": ids(1, 2), "past_key_values": Cache(), "scale": 1}
    for _ in range(3):
        steps.run_forward(model, (), kwargs)
    changed = {**kwargs, **other}
    assert steps.run_forward(model, (), changed) is None
    output = steps.run_forward(model, (), changed)
    expected = changed["input_ids"] * changed["scale"] + changed.get("attention_mask", torch.zeros(1)).sum()
    assert output["logits"].tolist() == expected.tolist()
    assert cuda.captures == 2
    assert steps.run_forward(model, (), kwargs)["logits"].tolist() == [[1], [2]]  # the first is still there
    assert cuda.captures == 2


@pytest.mark.parametrize(
    ("args", "other"),
    [
        ((), {"input_ids": torch.ones(2, 5, dtype=torch.long)}),
        ((), {"input_ids": None}),
        ((), {"past_key_values": None}),
        ((), {"past_key_values": Cache(compileable=False)}),
        ((), {"past_key_values": Cache(initialized=False)}),
        ((ids(1),), {}),
    ],
    ids=["a prompt", "embeddings", "no cache", "a cache that grows", "a cache without tensors yet", "positional"],
)
def test_what_is_no_decode_step_over_a_fixed_cache_is_left_to_the_caller(cuda, args, other):
    steps, _, model = make(cuda)
    kwargs = {"input_ids": ids(1, 2), "past_key_values": Cache(), **other}
    for _ in range(4):
        assert steps.run_forward(model, args, kwargs) is None
    assert cuda.captures == 0


def test_a_capture_that_fails_is_undone_and_not_tried_again(cuda):
    steps, dispatcher, model = make(cuda)
    kwargs = {"input_ids": ids(1, 2), "past_key_values": Cache()}
    cuda.fails = True
    for _ in range(4):
        assert steps.run_forward(model, (), kwargs) is None
    assert (cuda.captures, cuda.ended, cuda.capturing, cuda.replays) == (1, 1, False, 0)
    assert dispatcher.forgotten == 1  # nothing has run, so no rank is ahead of another
    cuda.fails = False
    other = {**kwargs, "past_key_values": Cache()}
    assert steps.run_forward(model, (), other) is None
    assert steps.run_forward(model, (), other)["logits"].tolist() == [[1], [2]]


def test_an_error_that_is_not_about_the_capture_reaches_the_caller(cuda):
    steps, dispatcher, _ = make(cuda)

    def broken(**_):
        raise ValueError("a layer that is wrong")

    kwargs = {"input_ids": ids(1), "past_key_values": Cache()}
    assert steps.run_forward(broken, (), kwargs) is None
    with pytest.raises(ValueError, match="a layer that is wrong"):
        steps.run_forward(broken, (), kwargs)
    assert not cuda.capturing
    assert dispatcher.forgotten == 1


def test_graphs_are_forgotten_with_their_cache(cuda):
    steps, _, model = make(cuda)
    kept, cache = Cache(), Cache()
    for one in (kept, cache):
        for _ in range(2):
            steps.run_forward(model, (), {"input_ids": ids(1), "past_key_values": one})
    model.caches.clear()
    assert len(cuda.alive) == 2
    del cache, one
    gc.collect()
    assert len(cuda.alive) == 1  # a graph does not keep its cache alive
    cuda.fails = True
    failing = Cache()
    for _ in range(2):
        steps.run_forward(model, (), {"input_ids": ids(1), "past_key_values": failing})
    cuda.fails = False
    assert steps.run_forward(model, (), {"input_ids": ids(1), "past_key_values": failing}) is None  # not tried again
    model.caches.clear()
    gone = weakref.ref(failing)
    del failing
    gc.collect()
    assert gone() is None


def test_the_oldest_of_many_graphs_goes_first(cuda):
    steps, _, model = make(cuda)
    caches = [Cache() for _ in range(graphs.MOST_GRAPHS + 1)]
    for cache in caches:
        for _ in range(2):
            steps.run_forward(model, (), {"input_ids": ids(1), "past_key_values": cache})
    assert len(cuda.alive) == graphs.MOST_GRAPHS
    captures = cuda.captures
    steps.run_forward(model, (), {"input_ids": ids(1), "past_key_values": caches[-1]})
    assert cuda.captures == captures
    for _ in range(3):  # once more, and then it stays: the others are as old as they were
        steps.run_forward(model, (), {"input_ids": ids(1), "past_key_values": caches[0]})
        assert cuda.captures == captures + 1
    assert len(cuda.alive) == graphs.MOST_GRAPHS


def test_idle_steps_are_captured_at_their_second_time(cuda):
    steps, dispatcher, _ = make(cuda)
    for number in range(1, 5):
        steps.run_idle()
        assert dispatcher.ran == 2 * number  # both layers, once each
    assert (cuda.captures, cuda.replays) == (1, 3)


def test_idle_steps_run_all_the_same_where_they_cannot_be_captured(cuda):
    steps, dispatcher, _ = make(cuda)
    steps.run_idle()
    cuda.fails = True
    for number in range(2, 5):
        steps.run_idle()
        assert dispatcher.ran == 2 * number  # the other ranks count on each of them
    assert (cuda.captures, cuda.replays) == (1, 0)
    assert dispatcher.forgotten == 1


def test_a_step_may_be_a_graph_if_the_backend_can_and_all_rows_go_at_once(cuda):
    steps, _, _ = make(cuda, capacity=3)
    assert steps.begin(3, 0).captures
    assert not steps.begin(4, 0).captures  # two chunks
    assert not steps.begin(0, 0).captures  # none
    steps, _, _ = make(cuda, tensor_parallel_size=2)
    assert not steps.begin(3, 0).captures


def test_a_step_in_which_others_bring_many_rows_has_a_graph_of_its_own(cuda):
    steps, _, model = make(cuda)
    kwargs = {"input_ids": ids(1), "past_key_values": Cache()}
    few, many = (100, 28), (100, 29)  # 32 rows for each expert, and more
    for counts in (few, many):
        for _ in range(3):
            steps.run_forward(model, (), kwargs, counts)
    assert model.calls == 2
    assert (cuda.captures, cuda.replays) == (2, 4)
    steps.run_forward(model, (), kwargs, few)
    assert (cuda.captures, cuda.replays) == (2, 5)
    for counts in ((0, 128), (0, 129)):
        for _ in range(3):
            steps.run_idle(*counts)
    assert (cuda.captures, cuda.replays) == (4, 9)
