"""Each benchmark runs; its numbers are made by hand, with the commands in documentation/benchmarks.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = ["bench_linear", "bench_create", "bench_files", "bench_denoise", "bench_step", "bench_own_python"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_benchmark_runs_and_prints_a_table(name: str, repository: Path) -> None:
    script = repository / "tests" / "benchmarks" / f"{name}.py"
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(script), "--quick"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "|---|" in result.stdout
    assert f"{name}.py" in (repository / "documentation" / "benchmarks.md").read_text()
