"""What the GPU benchmarks and tests measure for 2, 4 and 8 ranks, without a GPU."""

import importlib
import shlex
from pathlib import Path

import pytest

from many_ranks import ranks_for, repeated

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmark_named(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_eight_ranks_have_the_uneven_rows_of_dispatch_and_zipf(benchmark_named):
    bench = benchmark_named("bench_dispatch")
    options = bench.read_options(["--gpus", "8"])
    assert options.gpus == 8
    uneven = (4096, 512, 64, 64, 8, 1, 0, 0)
    cases = bench.cases_of(8, options)
    assert [counts for counts, zipf in cases[:7] if not zipf] == [(tokens,) * 8 for tokens in bench.EVEN]
    assert cases[7:10] == [(uneven, 0.0), ((256, 1, 17, 130, 64, 8, 1, 0), 0.0), ((512, 0, 3, 0, 0, 1, 0, 0), 0.0)]
    assert cases[10:] == [((32,) * 8, 1.0), ((1024,) * 8, 1.0), (uneven, 1.0)]
    chosen = bench.read_options(["--gpus", "8", "--counts", "5,0,0,0,0,0,0,1"])
    assert bench.cases_of(8, chosen) == [((5, 0, 0, 0, 0, 0, 0, 1), 0.0)]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_dispatch_cases_fit_every_number_of_ranks(benchmark_named, ranks):
    bench = benchmark_named("bench_dispatch")
    for options in ([], ["--growth"], ["--tokens", "3", "9"]):
        cases = bench.cases_of(ranks, bench.read_options(options))
        assert len(set(cases)) == len(cases)
        assert {len(counts) for counts, _ in cases} == {ranks}
    assert all(experts % ranks == 0 for _, experts in bench.SHAPES)
    # The goals are given in this order.
    rows = len(bench.EVEN) + len(benchmark_named("uneven").token_counts(ranks))
    assert {len(goals) for goals in bench.GOALS.values()} == {rows}


def test_the_rows_of_two_and_four_ranks_are_those_of_the_stored_results(benchmark_named):
    uneven = benchmark_named("uneven")
    assert uneven.token_counts(2) == [(4096, 512), (256, 1), (512, 0)]
    assert uneven.token_counts(4) == [(4096, 512, 64, 64), (256, 1, 17, 130), (512, 0, 3, 0)]
    assert [sizes for sizes, _ in uneven.batches(4)] == [
        (1, 1, 1, 1), (64, 8, 1, 0), (64, 8, 1, 1), (64, 64, 64, 64), (256, 64, 8, 1), (16, 1, 1, 0), (1, 1, 1, 1),
    ]  # fmt: skip
    assert uneven.batches(4)[6] == ((1, 1, 1, 1), (4096, 512, 64, 64))
    assert uneven.batches(2)[3] == ((256, 256), (64, 64))


@pytest.mark.parametrize("name", ["bench_model", "bench_engine", "bench_vllm_exchange"])
def test_models_and_engines_take_eight_ranks(benchmark_named, name, capsys):
    bench = benchmark_named(name)
    assert bench.read_options(["--gpus", "8"]).gpus == 8
    with pytest.raises(SystemExit):
        bench.read_options(["--gpus", "3"])  # 128 experts on 3 ranks
    assert "invalid choice: 3" in capsys.readouterr().err
    cases = bench.batches(8)
    assert ((64,) * 8, (64,) * 8) in cases
    assert ((256, 64, 8, 1, 1, 1, 0, 0), (64,) * 8) in cases
    assert ((1,) * 8, (64,) * 8) in cases
    # `--cases` names the same case for 4 and for 8.
    for four, eight in zip(bench.batches(4), cases, strict=True):
        assert tuple(part[:4] for part in eight) == four


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_batches_name_requests_and_prompts_of_every_rank(benchmark_named, ranks):
    cases = benchmark_named("uneven").batches(ranks)
    assert len(set(cases)) == 7
    assert {len(part) for case in cases for part in case} == {ranks}
    assert all(sum(sizes) > 0 for sizes, _ in cases)


def test_gpu_tests_use_as_many_ranks_as_divide_the_experts():
    assert [ranks_for(num_gpus) for num_gpus in (0, 1, 2, 3, 4, 7, 8, 16)] == [2, 2, 2, 2, 4, 4, 8, 8]
    assert repeated((2, 0, 1), 8) == (2, 0, 1, 2, 0, 1, 2, 0)
    assert repeated((2, 0, 1), 2) == (2, 0)


def test_the_commands_for_eight_gpus_are_taken(benchmark_named):
    section = (ROOT / "docs/benchmarks/gpu.md").read_text().split("## Eight GPUs: not measured yet")[1]
    lines = [line for line in section.split("```")[1].splitlines() if " benchmarks/" in line]
    measured = {}
    for line in lines:
        _, script, *arguments = shlex.split(line)
        options = benchmark_named(Path(script).stem).read_options(arguments)
        measured.setdefault(Path(script).stem, []).append(options)
    assert set(measured) == {
        "bench_dispatch", "bench_engine", "bench_vllm_exchange", "bench_model", "bench_agreement"
    }  # fmt: skip
    assert measured["bench_agreement"][0].ranks == [8]
    assert all(of[0].gpus == 8 for name, of in measured.items() if name != "bench_agreement")
    (on_four,) = (options for options in measured["bench_engine"] if options.gpus == 4)
    assert [benchmark_named("uneven").batches(4)[case][0] for case in on_four.cases] == [(64,) * 4]
