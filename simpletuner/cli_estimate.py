"""The command `simpletuner estimate`: memory, disk space and time of a run before it begins."""

import json
from dataclasses import asdict
from math import isfinite
from typing import Annotated

import typer

from simpletuner.cli_options import ConfigOption, Overrides


def estimate_command(
    *,
    config: ConfigOption = None,
    arguments: Overrides = None,
    card: Annotated[
        str | None, typer.Option("--card", metavar="CARD", help="A card by its name, such as 'RTX 4090'.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option("--memory", metavar="GIB", min=0.1, help="Memory of another card, in GiB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes and seconds.")] = False,
) -> None:
    """Estimate memory, disk space and time of a run, and what to change if it does not fit a card."""
    from simpletuner.helpers.configuration.finding import choose_config
    from simpletuner.helpers.configuration.load import load_config
    from simpletuner.helpers.errors import ConfigError
    from simpletuner.helpers.estimating.advice import suggestions
    from simpletuner.helpers.estimating.cards import card_named, cards
    from simpletuner.helpers.estimating.disk import GIB, disk_problems
    from simpletuner.helpers.estimating.estimate import activations, estimate
    from simpletuner.helpers.estimating.report import activation_lines, advice_lines, lines
    from simpletuner.helpers.models import registry

    if memory is not None and not isfinite(memory):
        raise ConfigError("--memory: must be a number of GiB, for instance 24.")
    named = None if card is None else card_named(card)
    memory_gib = memory if memory is not None or named is None else named.memory_gib
    file, overrides = choose_config(config, arguments or ())
    run = load_config(file, overrides=overrides, families=registry.specs())
    found = estimate(run)
    if found is None:
        raise ConfigError(
            f"There is no memory model of {run.model.pretrained_model_name_or_path} as model_family "
            f"{run.model.model_family}, so nothing is estimated. Check that it is a model of this family."
        )
    spec = registry.specs()[run.model.model_family]
    advice = [] if memory_gib is None else suggestions(run, spec, memory_bytes=round(memory_gib * GIB))
    if as_json:
        values = found.as_json(cards() if named is None else (named,))
        values["memory_gib"] = memory_gib
        values["activations"] = [{**asdict(each), "size": str(each.size)} for each in activations(run)]
        values["disk_problems"] = disk_problems(found.disk)
        values["changes"] = [
            {"values": each.values, "cost": each.cost, "peak_device_bytes": each.peak_device_bytes}
            for each in advice
        ]
        print(json.dumps(values, indent=2, ensure_ascii=False))
        return
    for line in lines(found, memory_gib=memory_gib, card=named):
        print(line)
    for line in activation_lines(activations(run)):
        print(line)
    for line in advice_lines(advice, memory_gib=memory_gib or 0):
        print(line)
