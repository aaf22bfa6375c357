import doctest
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", ["reference/dp_metadata.md", "how-to/placement.md", "how-to/vllm.md"])
def test_every_python_example_of_the_page_gives_what_it_shows(page):
    text = (DOCS / page).read_text()
    blocks = "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    test = doctest.DocTestParser().get_doctest(blocks, {}, page, page, 0)
    assert len(test.examples) >= 4
    failures = []
    doctest.DocTestRunner(verbose=False).run(test, out=failures.append)
    assert not failures, "".join(failures)


def test_every_entry_of_the_published_page_has_a_chapter():
    chapters = re.findall(r"^## `?(\w+)", (DOCS / "reference" / "dp_metadata.md").read_text(), flags=re.MULTILINE)
    published = {
        "make",
        "chunked_sizes",
        "sp_local_sizes",
        "get_chunk_sizes_across_dp_rank",
        "cu_tokens_across_sp",
        "local_sizes",
    }
    assert published <= set(chapters)
    assert "## The constructor (`new`)" in (DOCS / "reference" / "dp_metadata.md").read_text()


def test_the_table_of_costs_is_that_of_the_stored_result():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks" / "bench_dp_metadata.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    page = (DOCS / "benchmarks" / "dp_metadata.md").read_text()
    (stored,) = re.findall(r"`(benchmarks/results/[^`]+)`", page)
    rows = [json.loads(line) for line in (ROOT / stored).read_text().splitlines()]
    assert bench.table(rows) in page
    assert min(row["times_faster"] for row in rows) >= 20
