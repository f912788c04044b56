"""Each benchmark runs; its numbers are made by hand, with the commands in documentation/benchmarks.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.processes import start

SCRIPTS = [
    "bench_linear",
    "bench_create",
    "bench_files",
    "bench_denoise",
    "bench_step",
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
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_benchmark_runs_and_prints_a_table(name: str, repository: Path) -> None:
    script = repository / "tests" / "benchmarks" / f"{name}.py"
    running = start(script, "--quick")
    assert running.wait() == 0, running.errors()[-2000:]
    assert "|---|" in running.output()
    assert f"{name}.py" in (repository / "documentation" / "benchmarks.md").read_text()
