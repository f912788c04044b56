"""What became of the keys of a SimpleTuner file, in one block of lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.configuration.schema.values import DifferingDefault
from simpletuner.helpers.configuration.text.decisions import Decision
from simpletuner.helpers.configuration.text.problems import hide_all, shown
from simpletuner.helpers.io.names import counted, printable

_SECOND = "the rest of the file"


def translation_lines(config: RunConfig) -> Iterator[str]:
    """A line with the numbers, then one for each translated key and for each reason of no effect.

    Nothing where every key stays as it is.
    """
    changed = [each for each in config.decisions if each.outcome in ("translated", "approximate")]
    idle = _by_text(each for each in config.decisions if each.outcome == "no effect")
    if not changed and not idle:
        return
    count = sum(map(len, idle.values()))
    parts = [f"{counted(len(changed), 'key')} translated"] if changed else []
    parts += [f"{count if changed else counted(count, 'key')} without effect here"] if idle else []
    yield f"{', '.join(parts)}:"
    for each in dict.fromkeys(map(_line, changed)):
        yield hide_all(printable(each), config.hidden)
    for text, keys in idle.items():
        yield printable(f"{', '.join(keys)}: no effect. {text}")


def default_lines(differing: Sequence[DifferingDefault]) -> Iterator[str]:
    """The keys that are left out and that SimpleTuner gives another value."""
    if not differing:
        return
    listed = ", ".join(f"{each.key} {each.ours} (there {each.theirs})" for each in differing)
    yield f"not as SimpleTuner's where the file leaves the key out: {listed}."
    yield 'Set "defaults": "simpletuner" for those, or "ours", which ends this list.'


def _by_text(decisions: Iterable[Decision]) -> dict[str, dict[str, None]]:
    """Text -> the keys, without the names of datasets, in the order of the file."""
    keys: dict[str, dict[str, None]] = {}
    for each in decisions:
        name = each.key.rpartition(".")[2] or _SECOND
        keys.setdefault(each.text, {})[name] = None
    return keys


def _line(decision: Decision) -> str:
    value = "left out" if decision.value is None else shown(decision.value)
    about = "approximately " if decision.outcome == "approximate" else ""
    return f"{decision.key} {value}: {about}{decision.ours}. {decision.text}".rstrip()
