"""The T-LoRA schedule of a run: how many ranks are open at each timestep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simpletuner.helpers.reporting.html_report.charts import Chart, Curve, draw_chart
from simpletuner.helpers.reporting.html_report.folder import RunSnapshot
from simpletuner.helpers.reporting.html_report.markup import escape
from simpletuner.helpers.reporting.html_report.series import Points


def render_schedule(run: RunSnapshot) -> str:
    """A chart and a sentence; nothing for an adapter without a schedule."""
    adapter = run.manifest.get("adapter") or _adapter_of(run.config.get("lycoris_config", {}))
    ranks: Sequence[tuple[int, int]] | None = adapter.get("ranks")
    if not ranks:
        return ""
    facts = adapter["schedule"]
    timesteps = np.arange(ranks[-1][0] + 1, dtype=np.float64)
    places = np.searchsorted([timestep for timestep, _ in ranks], timesteps, side="right") - 1
    values = np.array([rank for _, rank in ranks], dtype=np.float64)[places]
    curve = Curve("open ranks", Points(timesteps, values, values, values), colour=4)
    words = (
        f"From {values[0]:.0f} ranks at the clean image to {values[-1]:.0f} at pure noise, "
        f"{values.mean():.1f} in the mean over all timesteps; exponent {facts['alpha']:g}, "
        f"rounding {facts['schedule']}."
    )
    chart = Chart("Open ranks", [curve], axis="timestep", is_wide=True, is_stepped=True, from_zero=True)
    return f'<p>{escape(words)}</p>\n<div class="charts">{draw_chart(chart)}</div>'


def _adapter_of(lycoris: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts from the configuration alone, for runs of earlier versions."""
    if lycoris.get("algo") != "tlora":
        return {}
    from simpletuner.helpers.reporting.html_report.manifest import (
        rank_curve,  # torch, needed for such runs only
    )

    stated = {
        "max_rank": int(lycoris["linear_dim"]),
        "min_rank": int(lycoris.get("tlora_min_rank", 1)),
        "alpha": float(lycoris.get("tlora_alpha", 1.0)),
        "schedule": lycoris.get("tlora_schedule", "floor"),
    }
    return {"schedule": stated, "ranks": rank_curve(stated)}
