# vLLM's own classes, in a process of their own, with what the GPU would do left out: registration, refusals, the counts
# of a step. Needs a Python that can import vLLM: this one, or the one named by LOCKSTEP_TEST_VLLM. Its sources on the
# path are enough, vLLM need not be built.

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import dataclasses, importlib, inspect, json, os
from types import SimpleNamespace
import torch
import vllm
from lockstep.integrations import vllm as plugin, vllm_exchange

facts = {"version": vllm.__version__}
plugin.register()
plugin.register()
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import config as fused, unquantized_fused_moe_method as own
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

facts["missing"] = vllm_exchange.missing_symbols()
facts["parameters"] = all(
    list(inspect.signature(getattr(own.UnquantizedFusedMoEMethod, name)).parameters)
    == list(inspect.signature(getattr(vllm_exchange.make_method(own.UnquantizedFusedMoEMethod), name)).parameters)
    for name in ("apply", "process_weights_after_loading")
)
parallel = fused.FusedMoEParallelConfig(
    tp_size=1, pcp_size=1, dp_size=4, ep_size=4, tp_rank=0, pcp_rank=0, dp_rank=1, ep_rank=1, sp_size=1, use_ep=True,
    all2all_backend="allgather_reducescatter", enable_eplb=False,
)
moe = fused.FusedMoEConfig(
    num_experts=128, experts_per_token=8, hidden_dim=2048, intermediate_size=768, num_local_experts=32,
    num_logical_experts=128, activation=MoEActivation.SILU, device="cpu",
    routing_method=list(fused.RoutingMethodType)[0], moe_parallel_config=parallel, in_dtype=torch.bfloat16,
    max_num_tokens=16384, max_capture_size=256,
)
# What vLLM chooses on Hopper; this machine has no GPU to choose for.
own.select_unquantized_moe_backend = lambda moe_config: (own.UnquantizedMoeBackend.TRITON, None)
config = VllmConfig(device_config=DeviceConfig(device="cpu"))
with set_current_vllm_config(config):
    method = own.UnquantizedFusedMoEMethod(moe)
facts["method"] = type(method).__name__
facts["plain"] = vllm_exchange.unsupported(config, moe, method)
changed = dataclasses.replace(moe, moe_parallel_config=dataclasses.replace(parallel, enable_eplb=True), has_bias=True)
facts["changed"] = vllm_exchange.unsupported(config, changed, method)
facts["overlaps_alone"] = method.mk_can_overlap_shared_experts

def noting(x, ids, weights, counts):
    return [counts, list(x.shape), str(ids.dtype), str(weights.dtype)]

method.run_rows = noting
config.parallel_config.data_parallel_size, config.parallel_config.data_parallel_rank = 4, 1
counts = torch.tensor([8, 8, 3, 8], dtype=torch.int32)
with set_forward_context(None, config, num_tokens=8, num_tokens_across_dp=counts):
    arguments = torch.zeros(8, 2048), torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.int32)
    facts["applied"] = method.apply(SimpleNamespace(apply_router_weight_on_input=False), *arguments, None, None)
facts["runners"] = {}
for name, owner in vllm_exchange.RUNNERS:
    try:
        module = importlib.import_module(name)
    except ImportError as error:  # of one of the many packages that a runner needs
        facts["runners"][f"{name}.{owner}"] = f"not imported: {error}"
        continue
    needed = ("execute_model", "_dummy_run", "sample_tokens") if owner.endswith("Runner") else ("get_output",)
    facts["runners"][f"{name}.{owner}"] = [each for each in needed if not hasattr(getattr(module, owner), each)]
facts["watched"] = vllm_exchange.watch_runners()
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    python = os.environ.get("LOCKSTEP_TEST_VLLM", sys.executable)
    can = subprocess.run([python, "-c", "import vllm.config"], capture_output=True, text=True, timeout=120)
    if can.returncode:
        pytest.skip(f"{python} cannot import vLLM; name one that can in LOCKSTEP_TEST_VLLM")
    source = str(Path(__file__).parents[2] / "src")
    environment = os.environ | {
        "LOCKSTEP_VLLM": "exchange",
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [python, "-c", SCRIPT],
        env=environment,
        cwd=tmp_path_factory.mktemp("vllm"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_vllm_makes_our_method(facts):
    assert facts["method"] == "LockstepFusedMoEMethod"
    assert facts["missing"] == ""
    assert facts["parameters"]


def test_a_plain_configuration_is_supported_and_another_is_refused(facts):
    assert facts["plain"] == ""
    assert "EPLB" in facts["changed"]
    assert "biases" in facts["changed"]


def test_a_layer_gets_the_counts_of_vllms_own_forward_context(facts):
    assert facts["applied"] == [[8, 8, 3, 8], [8, 2048], "torch.int32", "torch.float32"]


def test_the_runners_have_what_is_wrapped(facts):
    found = {name: lacks for name, lacks in facts["runners"].items() if not str(lacks).startswith("not imported")}
    if not found:
        pytest.skip(f"no runner of vLLM {facts['version']} can be imported here: {facts['runners']}")
    assert not any(found.values())
    assert facts["watched"] == any(name.endswith(".GPUModelRunner") for name in found)
