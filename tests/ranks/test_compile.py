"""`torch.compile` inside join: one graph, right outputs on uneven ranks, no recompiling, no wait for a compiler."""

import itertools
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import lockstep
from lockstep.models.tiny import make_tiny
from lockstep.testing import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "torch_compile.md"
COMPILES_S = 11.0  # longer than the deadline of the other ranks
DEADLINE_S = 8.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("compile") / "tiny", num_layers=2, num_experts=6))


class Graphs:
    """A backend that keeps what it is given."""

    def __init__(self, backend, sleep_s=0.0):
        self.graphs, self.backend, self.sleep_s = [], backend, sleep_s

    def __call__(self, graph, inputs):
        time.sleep(self.sleep_s)
        self.graphs.append(graph)
        if self.backend == "eager":
            return graph.forward
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs)

    def operations(self):
        """Per graph, the layer that each of our operations runs."""
        ours = torch.ops.lockstep.moe
        return [
            [node.args[3] for node in graph.graph.nodes if node.target in (ours, ours.default)] for graph in self.graphs
        ]


def wrapped(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def forward_only(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def run(path, ways, backend):
    return [run_one(path, way, backend, COMPILES_S if way is wrapped else 0.0) for way in ways]


@torch.no_grad()
def run_one(path, way, backend_name, compiles_s):
    """Other numbers of rows and calls on each rank; the last rank never calls. Rank 0 compiles for long."""
    from transformers import AutoModelForCausalLM

    torch.compiler.reset()  # each way knows nothing of the shapes before
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    whole = AutoModelForCausalLM.from_pretrained(path)
    model = lockstep.from_pretrained(path, deadline_s=DEADLINE_S)
    backend = Graphs(backend_name, compiles_s if rank == 0 else 0.0)
    compiled = way(model, backend)
    errors, counts = [], []
    with lockstep.join(model):
        for number in range(0 if rank == last else 3 + 3 * (rank + 1)):
            ids = (torch.arange(3 + 2 * number + rank) % 50).reshape(1, -1)
            logits = compiled(input_ids=ids, use_cache=False).logits
            errors.append(float((logits - whole(input_ids=ids, use_cache=False).logits).abs().max()))
            counts.append(len(backend.graphs))
    return errors, counts, backend.operations()


@pytest.mark.ranks(3)
@pytest.mark.parametrize(("ways", "backend"), [((wrapped, in_place, forward_only), "eager"), ((wrapped,), "inductor")])
def test_uneven_and_idle_ranks(tiny, ways, backend):
    *calling, idle = run_ranks(3, run, tiny, ways, backend, deadline_s=250)
    assert idle == [([], [], [])] * len(ways)
    for errors, counts, operations in itertools.chain(*calling):
        assert max(errors) < 1e-5
        # The first count of rows is compiled as it is, the second for any: nothing after it.
        assert counts[:2] == [1, 2] and counts[-1] == 2, counts
        assert operations == [[0, 1]] * 2  # both layers in one graph: no break between or in them


class SlowInStep(Graphs):
    """A backend that takes its time with the first graph that it compiles inside a step."""

    def __call__(self, graph, inputs):
        inside = lockstep.current_step() is not None
        self.graphs.append(graph)
        if inside and self.sleep_s:
            time.sleep(self.sleep_s)
            self.slept, self.sleep_s = True, 0.0
        return graph.forward

    slept = False


@torch.no_grad()
def broken_after_the_first_layer(path):
    """Rank 0 compiles the second part of its model inside a step, for longer than the deadline; rank 2 never calls."""
    from transformers import AutoModelForCausalLM

    rank, deadline_s = dist.get_rank(), 2.0
    whole = AutoModelForCausalLM.from_pretrained(path)
    model = lockstep.from_pretrained(path, deadline_s=deadline_s)
    model.model.layers[1].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    backend = SlowInStep("eager", 3 * deadline_s if rank == 0 else 0.0)
    model.compile(backend=backend)
    errors = []
    with lockstep.join(model):
        for length in (4, 6, 5) if rank < 2 else ():
            ids = torch.arange(length)[None]
            logits = model(input_ids=ids, use_cache=False).logits
            errors.append(float((logits - whole(input_ids=ids, use_cache=False).logits).abs().max()))
    return errors, backend.slept, [layers for layers in backend.operations() if layers]


@pytest.mark.ranks(3)
def test_other_ranks_wait_for_one_that_compiles_inside_a_step(tiny):
    *calling, idle = run_ranks(3, broken_after_the_first_layer, tiny, deadline_s=120)
    assert idle == ([], False, [])
    assert [slept for _, slept, _ in calling] == [True, False]
    for errors, _, operations in calling:
        assert max(errors) < 1e-5
        assert operations[:2] == [[0], [1]]  # the two layers are in graphs of their own


def generated(path):
    from transformers import AutoModelForCausalLM

    rank = dist.get_rank()
    ids = (torch.arange(4 + rank) % 50).reshape(1, -1)
    expected = AutoModelForCausalLM.from_pretrained(path).generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    model = lockstep.from_pretrained(path, deadline_s=20)
    backend = Graphs("eager")
    in_place(model, backend)
    with lockstep.join(model):
        tokens = [model.generate(input_ids=ids, max_new_tokens=5, do_sample=False) for _ in range(1 + rank)]
        seen = len(backend.graphs)
        tokens.append(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False))
    return [torch.equal(one, expected) for one in tokens], len(backend.graphs) - seen


@pytest.mark.ranks(2)
def test_generate(tiny):
    for rank, (equal, recompiled) in enumerate(run_ranks(2, generated, tiny, deadline_s=120)):
        assert equal == [True] * (2 + rank) and recompiled == 0


def refused(path):
    outside = torch.compile(lockstep.from_pretrained(path), backend="eager")
    messages = []
    try:
        outside(input_ids=torch.tensor([[1, 2]]))
    except Exception as error:
        messages.append(str(error))
    shared = torch.compile(lockstep.from_pretrained(path, tensor_parallel_size=2), backend="eager")
    try:
        with torch.no_grad(), lockstep.join(shared):
            shared(input_ids=torch.tensor([[1, 2]]))
    except Exception as error:
        messages.append(str(error))
    return messages


@pytest.mark.ranks(2)
def test_what_cannot_be_compiled_says_so(tiny):
    for outside, shared in run_ranks(2, refused, tiny):
        assert "call it inside `with lockstep.join(model):`" in outside
        assert "torch.compile needs tensor_parallel_size 1" in shared


def page_script(path):
    (script,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    script = script.replace("model.compile()", 'model.compile(backend="eager")')  # quicker here
    prompts = [torch.arange(length)[None] for length in ((3, 6, 4) if dist.get_rank() else (5,))]
    names = {"path": path, "prompts": prompts}
    exec(compile(script, PAGE.name, "exec"), names)
    return [tokens.shape[1] for tokens in names["outputs"]]


@pytest.mark.ranks(2)
def test_the_script_of_the_page(tiny):
    assert run_ranks(2, page_script, tiny, deadline_s=120) == [[9], [7, 10, 8]]
