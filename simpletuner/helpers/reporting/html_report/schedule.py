"""The T-LoRA rank schedule of a run: active rank by timestep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simpletuner.helpers.adapters.tlora.rank_schedule import min_rank_of
from simpletuner.helpers.reporting.html_report.charts import Chart, Curve, draw_chart
from simpletuner.helpers.reporting.html_report.folder import RunSnapshot
from simpletuner.helpers.reporting.html_report.markup import escape
from simpletuner.helpers.reporting.html_report.series import Points


def render_schedule(run: RunSnapshot) -> str:
    """A chart and its summary; "" for an adapter without a rank schedule."""
    adapter = run.manifest.get("adapter") or _adapter_of(run.config.get("lycoris_config", {}))
    ranks: Sequence[tuple[int, int]] | None = adapter.get("ranks")
    if not ranks:
        return ""
    settings = adapter["schedule"]
    timesteps = np.arange(ranks[-1][0] + 1, dtype=np.float64)
    indices = np.searchsorted([timestep for timestep, _ in ranks], timesteps, side="right") - 1
    values = np.array([rank for _, rank in ranks], dtype=np.float64)[indices]
    curve = Curve("active rank", Points(timesteps, values, values, values), colour=4)
    summary = (
        f"From {values[0]:.0f} ranks at the clean image to {values[-1]:.0f} at pure noise, "
        f"mean {values.mean():.1f} over all timesteps; exponent {settings['alpha']:g}, "
        f"rounding {settings['schedule']}."
    )
    chart = Chart("Active rank", [curve], axis="timestep", is_wide=True, is_stepped=True, from_zero=True)
    return f'<p>{escape(summary)}</p>\n<div class="charts">{draw_chart(chart)}</div>'


def _adapter_of(lycoris: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's adapter entry, from the configuration alone, for runs of earlier versions."""
    if lycoris.get("algo") != "tlora":
        return {}
    from simpletuner.helpers.reporting.html_report.manifest import (
        rank_curve,  # torch, needed for such runs only
    )

    stated = {
        "max_rank": int(lycoris["linear_dim"]),
        "min_rank": min_rank_of(lycoris.get("tlora_min_rank", 1), int(lycoris["linear_dim"])),
        "alpha": float(lycoris.get("tlora_alpha", 1.0)),
        "schedule": lycoris.get("tlora_schedule", "floor"),
    }
    return {"schedule": stated, "ranks": rank_curve(stated)}
