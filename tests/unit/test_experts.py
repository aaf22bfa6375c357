"""The local experts' grouped products against one row at a time."""

from types import SimpleNamespace

import pytest
import torch

from lockstep.errors import ConfigurationError
from lockstep.moe.experts import LocalExperts


def one_row_at_a_time(gate_up, down, hidden_states, gather_index, tokens_per_expert):
    output = []
    experts = [expert for expert, size in enumerate(tokens_per_expert) for _ in range(size)]
    for row, expert in zip(gather_index.tolist(), experts, strict=True):
        gate, up = (gate_up[expert].double() @ hidden_states[row].double()).chunk(2)
        output.append(down[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return torch.stack(output) if output else torch.zeros(0, hidden_states.shape[1], dtype=torch.float64)


def make(num_experts=4, hidden=16, intermediate=8, num_rows=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(num_experts, 2 * intermediate, hidden, generator=generator).to(dtype)
    down = torch.randn(num_experts, hidden, intermediate, generator=generator).to(dtype)
    hidden_states = torch.randn(num_rows, hidden, generator=generator).to(dtype)
    return gate_up, down, hidden_states


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [16, 10])  # rows of 40 bytes are not for grouped_mm: the plain loop serves
@pytest.mark.parametrize("tokens_per_expert", [[3, 0, 1, 4], [0, 0, 0, 0], [0, 0, 0, 5], [1, 0, 0, 0]])
def test_equals_one_row_at_a_time(dtype, hidden, tokens_per_expert):
    gate_up, down, hidden_states = make(hidden=hidden, dtype=dtype)
    gather_index = torch.arange(sum(tokens_per_expert)) * 3 % 7
    expected = one_row_at_a_time(gate_up, down, hidden_states, gather_index, tokens_per_expert)
    experts = LocalExperts.from_tensors(gate_up, down)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 4e-2)
    for counts in (tokens_per_expert, torch.tensor(tokens_per_expert)):
        output = experts(hidden_states, gather_index, counts)
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=10 * tolerance)


def test_a_rows_result_does_not_depend_on_other_rows():
    gate_up, down, hidden_states = make(num_rows=33)
    experts = LocalExperts.from_tensors(gate_up, down)
    together = experts(hidden_states, torch.arange(33), [10, 0, 20, 3])
    alone = experts(hidden_states, torch.tensor([12]), [0, 0, 1, 0])
    torch.testing.assert_close(together[12], alone[0], rtol=1e-6, atol=1e-5)


def test_biases_transposed_weights_and_no_gate():
    # The down product of expert e adds e to every entry: with zero weights only the bias is left.
    module = SimpleNamespace(
        has_gate=False,
        has_bias=True,
        is_transposed=True,
        has_post_expert_norm=True,
        up_proj=torch.zeros(3, 4, 8),
        up_proj_bias=torch.zeros(3, 8),
        down_proj=torch.zeros(3, 8, 4),
        down_proj_bias=torch.arange(3.0)[:, None].expand(3, 4),
        act_fn=torch.relu,
        post_expert_norm=lambda rows: rows * 2,
    )
    output = LocalExperts(module)(torch.ones(2, 4), torch.tensor([0, 1, 0, 1]), [1, 0, 3])
    assert output[:, 0].tolist() == [0.0, 4.0, 4.0, 4.0]


def test_parameters_are_read_at_every_call():
    gate_up, down, hidden_states = make()
    experts = LocalExperts.from_tensors(gate_up, down)
    experts.module.down_proj = torch.zeros_like(down)
    assert experts(hidden_states, torch.tensor([0]), [1, 0, 0, 0]).abs().max() == 0


def test_counts_of_another_length_are_refused():
    gate_up, down, hidden_states = make()
    with pytest.raises(ConfigurationError, match=r"one entry per local expert \(4\), got 3"):
        LocalExperts.from_tensors(gate_up, down)(hidden_states, torch.tensor([0]), [1, 0, 0])


def test_a_module_without_expert_weights_is_named():
    with pytest.raises(ConfigurationError, match=r"class Linear have no parameter 'gate_up_proj'"):
        LocalExperts(torch.nn.Linear(2, 2))
