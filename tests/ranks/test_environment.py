"""`lockstep env` and `benchmarks/calibrate_dispatch.py` on this machine, and what `env` says where something fails."""

import functools
import importlib
import json
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lockstep.cli import app
from lockstep.dispatch.constants import DispatchConstants, stored_path
from lockstep.runner import environment
from lockstep.testing import RankFailure, run_ranks

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.fixture(autouse=True)
def own_folder(tmp_path, environment):
    environment(XDG_CONFIG_HOME=tmp_path / "config")


@pytest.mark.ranks(2)
def test_env_tries_each_backend_and_says_what_to_do_where_one_is_not_to_be_had():
    shown = CliRunner().invoke(app, ["env", "--json"], catch_exceptions=False)
    document = json.loads(shown.stdout)
    assert document["versions"]["torch"] == torch.__version__
    assert document["versions"]["python"]
    assert document["dispatch_constants"]["path"].endswith(".json")
    backends = {(backend["name"], backend["transport"]): backend for backend in document["backends"]}
    assert len(backends) == 5
    for name in ("allgather", "alltoall"):
        backend = backends[name, "gloo"]
        assert backend["works"] is True, backend
        assert "equal the reference" in backend["detail"]
    if NUM_GPUS < 2:
        assert shown.exit_code == 0
        for key in (("allgather", "nccl"), ("alltoall", "nccl"), ("nvlink", "GPU memory")):
            assert backends[key]["works"] is None
            assert "two or more NVIDIA GPUs" in backends[key]["advice"]
    text = environment.describe(document)
    assert "works" in text
    assert "lockstep" in text


@pytest.mark.ranks(2)
def test_a_backend_that_fails_is_reported_with_advice():
    result = environment.try_backend("carrier pigeon", "cpu", time.monotonic() + 60)
    assert result["works"] is False
    assert "dispatcher must be one of" in result["detail"]
    assert "GLOO_SOCKET_IFNAME" in result["advice"]
    assert not environment.all_work({"backends": [result]})
    shown = CliRunner().invoke(app, ["env", "--json"], env={"GLOO_SOCKET_IFNAME": "nowhere0"})
    assert shown.exit_code == 1
    assert [backend["works"] for backend in json.loads(shown.stdout)["backends"][:2]] == [False, False]


@pytest.mark.ranks(2)
def test_a_backend_that_does_not_end_is_ended_and_the_rest_of_the_time_is_the_others():
    began = time.monotonic()
    sleep = functools.partial(sleep_in_place_of_a_proof, 60)
    result = environment.try_backend("allgather", "cpu", began + 60, proof=sleep, limit_s=6.0)
    assert (result["works"], result["detail"]) == (False, "ranks 0, 1 did not end within 6 s")
    assert time.monotonic() - began < 9
    result = environment.try_backend("alltoall", "cpu", time.monotonic() + 4)
    assert result["works"] is None
    assert "used up the 75 s for all" in result["detail"]


def sleep_in_place_of_a_proof(seconds, *_):
    time.sleep(seconds)


def run_proof_with_a_wrong_reference():
    from lockstep.moe import reference

    correct = reference.moe_reference
    reference.moe_reference = lambda *args: [rows + 0.01 for rows in correct(*args)]
    return environment.prove("allgather", "cpu")


@pytest.mark.ranks(2)
def test_results_are_compared():
    with pytest.raises(RankFailure, match=r"results for \(5, 3\) rows are off by up to 0\.01"):
        run_ranks(2, run_proof_with_a_wrong_reference)


def test_what_a_backend_on_gpus_lacks():
    all_there = {"nccl": True, "triton": True, "peers": True}
    assert environment.lacking("nvlink", 0, **all_there) == ("no GPUs here", "gpus")
    assert environment.lacking("nvlink", 1, **all_there) == ("1 GPU here", "gpus")
    assert environment.lacking("allgather", 2, **all_there) is None
    assert environment.lacking("nvlink", 2, **all_there) is None
    no_peers = ("GPUs 0 and 1 have no peer access", "peers")
    assert environment.lacking("nvlink", 2, nccl=True, triton=True, peers=False) == no_peers
    assert environment.lacking("nvlink", 2, nccl=True, triton=False, peers=True) == ("no Triton", "triton")
    assert environment.lacking("alltoall", 2, nccl=False, triton=True, peers=True) == ("no NCCL", "nccl")


def test_gpus_and_links_as_text():
    text = environment.describe(
        {
            "versions": {"lockstep": "0.1.0", "triton": None},
            "machine": {"system": "Linux", "processor": "x86_64", "cores": 32},
            "gpus": [{"index": 0, "name": "NVIDIA H200", "memory_gib": 139.8, "capability": "90"}],
            "links": {"source": "peer access as torch sees it", "table": "- peer\npeer -"},
            "peer_bandwidth_gbps": [[None, 386.0], [368.5, None]],
            "dispatch_constants": {"source": "shipped, for H200", "path": "there.json"},
            "backends": [
                {"name": "nvlink", "transport": "GPU memory", "works": False, "detail": "rank 1 failed", "seconds": 1.0,
                 "advice": "do this"},
            ],
        }
    )  # fmt: skip
    for part in ("GPU 0: NVIDIA H200", "peer -", "386.0", "FAILS", "rank 1 failed", "do this", "triton -"):
        assert part in text


@pytest.mark.ranks(2)
@pytest.mark.skipif(NUM_GPUS >= 2, reason="would measure GPUs, which takes longer")
def test_calibration_is_stored_where_auto_finds_it(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    document = importlib.import_module("calibrate_dispatch").calibrate(2, samples=1)
    assert document["file"] == str(stored_path("cpu"))
    stored = DispatchConstants.load(document["file"])
    assert set(stored.backends) == {"allgather", "alltoall"}
    assert stored.source == document["source"]
    assert all(constants.latency_us > 0 for constants in stored.backends.values())
