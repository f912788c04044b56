"""Processes that drew different seeds train with one, that of the first."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.processes import start_ranks, wait_for_all
from tests.integration.tiny_runs import TinyRun

SCRIPT = """
import json, sys
from contextlib import ExitStack
from pathlib import Path
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.models import registry
from simpletuner.helpers.training.preparing import prepare_run
config = load_config(Path(sys.argv[1]), families=registry.specs())
with ExitStack() as resources:
    context = prepare_run(config, resources)
    seeds = [config.training.seed, context.config.training.seed]
    path = Path(sys.argv[1]).with_name(f"seeds-{context.accelerator.process_index}.json")
    path.write_text(json.dumps(seeds))
"""


def test_the_processes_of_a_run_agree_on_the_drawn_seed(tmp_path: Path) -> None:
    TinyRun(tmp_path).config(seed=-1)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    wait_for_all(start_ranks(script, tmp_path / "config.json"))
    seeds = [json.loads((tmp_path / f"seeds-{rank}.json").read_text()) for rank in (0, 1)]
    drawn, shared = zip(*seeds, strict=True)
    assert drawn[0] != drawn[1]  # once in 2^31 they are equal
    assert set(shared) == {drawn[0]}
