"""`lockstep.join`: another number of calls on every rank, scripts that do other things, ranks that raise."""

import time

import pytest
import torch
import torch.distributed as dist
from said import say, sleep_until_said
from torch.utils._python_dispatch import TorchDispatchMode

import lockstep
from lockstep.errors import PeerFailedError
from lockstep.models.parallel import parallel_of
from lockstep.models.tiny import make_tiny
from lockstep.testing import run_ranks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("tiny"), num_layers=2, num_experts=12))


def _prompts(rank, calls):
    """Batches of `rank`: other shapes in every call."""
    generator = torch.Generator().manual_seed(rank)
    return [
        torch.randint(0, 256, (1 + (rank + call) % 3, 2 + (3 * call + rank) % 7), generator=generator)
        for call in range(calls)
    ]


def _generate(model, batches, new_tokens=4):
    return [
        model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=new_tokens, do_sample=False
        ).tolist()
        for batch in batches
    ]


def _whole_model(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def uneven_calls(path, calls, in_memory):
    rank = dist.get_rank()
    if in_memory:
        model = lockstep.parallelize(_whole_model(path), max_chunk_size_per_rank=5)
    else:
        model = lockstep.from_pretrained(path)
    with lockstep.join(model):
        outputs = _generate(model, _prompts(rank, calls[rank]))
    with lockstep.join(model):  # again, with the same groups; this time a bare forward pass
        logits = model(_prompts(rank, 1)[0]).logits if rank != 0 else None
    return outputs, logits is None or logits.shape[-1]


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("calls", "in_memory"), [((2, 5), True), ((0, 1, 3, 7), False)])
def test_ranks_call_generate_another_number_of_times(tiny, calls, in_memory):
    results = run_ranks(len(calls), uneven_calls, tiny, calls, in_memory)
    whole = _whole_model(tiny)
    for rank, (outputs, _) in enumerate(results):
        assert len(outputs) == calls[rank]
        assert outputs == _generate(whole, _prompts(rank, calls[rank]))


def scripts_of_their_own(path):
    rank = dist.get_rank()
    model = lockstep.from_pretrained(path)
    gathered = [None] * dist.get_world_size()
    with lockstep.join(model):
        first = _generate(model, _prompts(rank, rank + 1))
        dist.barrier()  # ranks with fewer calls stand here, and their experts serve the others
        dist.all_gather_object(gathered, first)
        second = _generate(model, _prompts(rank, 3 - rank))
    return gathered, second


@pytest.mark.ranks(3)
def test_barriers_and_gathers_of_the_script_do_not_hang(tiny):
    results = run_ranks(3, scripts_of_their_own, tiny)
    whole = _whole_model(tiny)
    expected = [_generate(whole, _prompts(rank, rank + 1)) for rank in range(3)]
    for rank, (gathered, second) in enumerate(results):
        assert gathered == expected
        assert second == _generate(whole, _prompts(rank, 3 - rank))


def one_sleeps(path):
    model = lockstep.from_pretrained(path)
    rank = dist.get_rank()
    with lockstep.join(model):
        _generate(model, _prompts(rank, 1))
        if rank == 1:
            sleep_until_said("three calls are done")
            return None
        outputs = _generate(model, _prompts(rank, 3))
        say("three calls are done")
        return outputs


@pytest.mark.ranks(2)
def test_a_rank_that_sleeps_does_not_hold_the_others_up(tiny):
    # Its script does not wake up before the calls of the other are done: its experts answered meanwhile.
    assert run_ranks(2, one_sleeps, tiny)[0] == _generate(_whole_model(tiny), _prompts(0, 3))


def one_raises(path, where):
    rank = dist.get_rank()
    model = lockstep.from_pretrained(path, deadline_s=40)
    if where == "in a step" and rank == 1:
        attention = model.model.layers[1].self_attn
        original = attention.forward

        def broken(*args, **kwargs):
            attention.forward = original
            raise ValueError("rank 1 broke in attention")

        attention.forward = broken
    experts = parallel_of(model).weights.experts[0]
    module = experts.module
    outcome, started = None, time.monotonic()
    try:
        with lockstep.join(model):
            if where == "in the script" and rank == 1:
                raise ValueError("rank 1 broke in its script")
            if where == "in idle experts" and rank == 1:
                experts.module = None
                time.sleep(1)
            _generate(model, _prompts(rank, 4))
    except Exception as error:
        outcome = (type(error).__name__, str(error), getattr(error, "rank", None))
    seconds = time.monotonic() - started
    experts.module = module
    with lockstep.join(model):
        outputs = _generate(model, _prompts(rank, 2))
    return outcome, seconds, outputs


@pytest.mark.ranks(3)
@pytest.mark.parametrize("where", ["in the script", "in a step", "in idle experts"])
def test_a_rank_that_raises_ends_all_sessions_and_the_model_works_again(tiny, where):
    results = run_ranks(3, one_raises, tiny, where)
    whole = _whole_model(tiny)
    for rank, (outcome, seconds, outputs) in enumerate(results):
        assert outcome is not None, where
        name, message, failed_rank = outcome
        if rank == 1:
            assert name != PeerFailedError.__name__
        else:
            assert (name, failed_rank) == ("PeerFailedError", 1)
            assert f"rank {rank} stops" in message
            if where != "in idle experts":
                assert "ValueError: rank 1 broke" in message
        assert seconds < 20  # half of the deadline
        assert outputs == _generate(whole, _prompts(rank, 2))


def outside_and_mismatch(path):
    rank = dist.get_rank()
    model = lockstep.from_pretrained(path)
    messages = []
    try:
        model(_prompts(rank, 1)[0])
    except RuntimeError as error:
        messages.append(str(error))
    other = lockstep.from_pretrained(path, max_chunk_size_per_rank=7 + rank)
    try:
        with lockstep.join(other):
            pass
    except lockstep.RankMismatchError as error:
        messages.append(str(error))
    return messages


@pytest.mark.ranks(2)
def test_calls_outside_a_session_and_unlike_settings_are_named_at_once(tiny):
    for outside, mismatch in run_ranks(2, outside_and_mismatch, tiny):
        assert "inside `with lockstep.join(model):`" in outside
        assert mismatch == "ranks disagree about max_chunk_size_per_rank: rank 0: 7, rank 1: 8"


def unlike_models_and_casts(path):
    from transformers import AutoConfig, AutoModelForCausalLM

    rank = dist.get_rank()
    messages = []
    torch.manual_seed(rank)
    unlike = lockstep.parallelize(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)))
    try:
        with lockstep.join(unlike):
            pass
    except lockstep.RankMismatchError as error:
        messages.append(str(error))
    model = lockstep.from_pretrained(path)
    try:
        model.save_pretrained("nowhere")
    except lockstep.ConfigurationError as error:
        messages.append(str(error))
    ids = _prompts(rank, 1)[0]
    with lockstep.join(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=rank == 0):
            first = model(ids).logits if rank == 0 else None  # rank 1 idles in float32
        try:
            model.get_input_embeddings().requires_grad_(True)
            model(ids).logits.sum().backward()
        except RuntimeError as error:
            messages.append(str(error))
        try:
            model.model(ids)
        except RuntimeError as error:
            messages.append(str(error))
    model.to(torch.bfloat16)  # after loading: the ranks must not go on in float32
    with lockstep.join(model):
        second = model(ids).logits if rank == 1 else None
    return messages, None if first is None else str(first.dtype), None if second is None else str(second.dtype)


@pytest.mark.ranks(2)
def test_what_would_go_wrong_in_silence_is_said(tiny):
    results = run_ranks(2, unlike_models_and_casts, tiny)
    for messages, _, _ in results:
        assert "ranks disagree about weights (checksum)" in messages[0]
        assert "holds only its rank's experts" in messages[1]
        assert "is for inference" in messages[2]
        assert "inside join, call the Qwen3MoeForCausalLM itself" in messages[3]
    assert results[1][2] == "torch.bfloat16"


class _Products(TorchDispatchMode):
    """Notes the shapes of batched products."""

    def __init__(self):
        super().__init__()
        self.batched = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default:
            self.batched.append(tuple(args[1].shape))
        return function(*args, **(kwargs or {}))


def last_logits(path):
    model = lockstep.from_pretrained(path, dispatcher="allgather", deadline_s=60)
    head = model.get_output_embeddings().weight
    with lockstep.join(model), torch.no_grad(), _Products() as products:
        for _ in range(2):
            model(input_ids=torch.arange(12).view(3, 4), logits_to_keep=1, use_cache=False)
    return [shape for shape in products.batched if shape[-1] == len(head)]


def test_the_head_is_read_once_for_the_last_rows_of_all_sequences(tiny):
    assert run_ranks(2, last_logits, tiny) == [[], []]


def one_never_comes(path):
    rank = dist.get_rank()
    model = lockstep.from_pretrained(path, deadline_s=0.7)
    started = time.monotonic()
    message = ""
    if rank == 0:
        try:
            with lockstep.join(model):
                pass
        except lockstep.RankAbsentError as error:
            message = str(error)
            say("given up")
    else:
        sleep_until_said("given up")
    return message, time.monotonic() - started


@pytest.mark.ranks(2)
def test_a_rank_that_never_enters_is_named(tiny):
    message, seconds = run_ranks(2, one_never_comes, tiny)[0]
    assert "ranks [1] did not enter join() of Qwen3MoeForCausalLM (model 0) within 0.7 s" in message
    assert seconds < 1.7


def two_models_in_opposite_order(path):
    models = [lockstep.from_pretrained(path, deadline_s=0.8) for _ in range(2)]
    if dist.get_rank() == 1:
        models.reverse()
    try:
        with lockstep.join(models[0]), lockstep.join(models[1]):
            return "no error"
    except lockstep.RankAbsentError as error:
        return str(error)


@pytest.mark.ranks(2)
def test_models_joined_in_opposite_order_are_named(tiny):
    results = run_ranks(2, two_models_in_opposite_order, tiny)
    for rank, message in enumerate(results):
        assert f"ranks [{1 - rank}] did not enter join() of Qwen3MoeForCausalLM (model {rank}) within 0.8 s" in message
        assert f"rank {1 - rank} was last seen waiting in join() of Qwen3MoeForCausalLM (model {1 - rank})" in message


def test_a_single_process_is_left_alone(tiny):
    model = lockstep.from_pretrained(tiny)
    assert "forward" not in model.__dict__
    with lockstep.join(model) as same:
        assert same is model
        assert _generate(model, _prompts(0, 1)) == _generate(_whole_model(tiny), _prompts(0, 1))


def by_mesh(path):
    from torch.distributed.device_mesh import init_device_mesh

    rank, said = dist.get_rank(), []
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "ep"))
    for options in ({"device_mesh": mesh}, {"device_mesh": mesh["ep"], "process_group": dist.group.WORLD}):
        try:
            lockstep.from_pretrained(path, **options)
        except lockstep.ConfigurationError as error:
            said.append(str(error))
    model = lockstep.from_pretrained(path, device_mesh=mesh["ep"])
    with lockstep.join(model):
        outputs = _generate(model, _prompts(rank, rank))
    return said, outputs


@pytest.mark.ranks(4)
def test_two_replicas_by_an_axis_of_a_device_mesh(tiny):
    model = _whole_model(tiny)
    for rank, (said, outputs) in enumerate(run_ranks(4, by_mesh, tiny)):
        assert "device_mesh must have one dimension, got 2 ('replica', 'ep')" in said[0]
        assert "both name the ranks" in said[1]
        assert outputs == _generate(model, _prompts(rank, rank))
