"""Each benchmark runs; its numbers are made by hand, with the commands in documentation/benchmarks.md."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.integration.processes import start

SCRIPTS = [
    "bench_linear",
    "bench_create",
    "bench_files",
    "bench_denoise",
    "bench_step",
    "bench_tlora_step",
    "bench_loop",
    "bench_own_python",
    "bench_images",
    "bench_optimizers",
    "bench_ema",
    "bench_token_routing",
    "bench_text_encoders",
    "bench_merging",
    "bench_losses",
    "bench_memory",
    "bench_tar",
    "bench_compile",
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_benchmark_runs_and_prints_a_table(name: str, repository: Path) -> None:
    script = repository / "tests" / "benchmarks" / f"{name}.py"
    running = start(script, "--quick")
    assert running.wait() == 0, running.errors()[-2000:]
    assert "|---|" in running.output()
    assert f"{name}.py" in (repository / "documentation" / "benchmarks.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_part_of_the_gpu_suite_runs_at_toy_size(tmp_path: Path, repository: Path) -> None:
    file = tmp_path / "suite.json"
    script = repository / "tests" / "benchmarks" / "gpu_suite.py"
    running = start(script, "--toy", "--minutes", "60", "--json", str(file))
    assert running.wait(1100) == 0, running.errors()[-2000:]
    rows = json.loads(file.read_text())["rows"]
    assert Counter(row["part"] for row in rows) == {
        "training": 9,
        "B6": 3,
        "gradients": 2,
        "compiled": 6,
        "fp16": 1,
        "quantised": 3,
    }
    timed = [row for row in rows if row["part"] not in ("gradients", "fp16")]
    assert all(row["ms"] > 0 and row["launches"] > 0 for row in timed)
    exact, rounded = (row["error"] for row in rows if row["part"] == "gradients")
    assert exact < 1e-5 < rounded < 0.05
    (half,) = (row["note"] for row in rows if row["part"] == "fp16")
    assert half.endswith("adapter finite")
