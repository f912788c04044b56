"""Plots prompt alignment over likeness, the trade-off of each contender."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from simpletuner.demo.comparison.plan import Contender
from simpletuner.demo.comparison.statistics import Curves, estimate


def plot_trade_off(groups: Mapping[tuple[Contender, int], Curves], file: Path) -> None:
    """Draw prompt alignment over likeness, one panel per rank, one point per number of steps."""
    import matplotlib as mpl  # its import takes half a second

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ranks = sorted({rank for _, rank in groups})
    figure, axes = plt.subplots(
        1, len(ranks), figsize=(5.2 * len(ranks), 4.4), sharex=True, sharey=True, squeeze=False
    )
    names = list(dict.fromkeys(contender.name for contender, _ in groups))
    for axis, rank in zip(axes[0], ranks, strict=True):
        for (contender, each_rank), curves in groups.items():
            if each_rank != rank:
                continue
            colour = f"C{names.index(contender.name)}"
            likeness = [estimate(column) for column in curves.values["concept"].T]
            alignment = [estimate(column) for column in curves.values["alignment"].T]
            axis.errorbar(
                [each.mean for each in likeness],
                [each.mean for each in alignment],
                xerr=[[e.mean - e.low for e in likeness], [e.high - e.mean for e in likeness]],
                yerr=[[e.mean - e.low for e in alignment], [e.high - e.mean for e in alignment]],
                marker="o",
                markersize=4,
                linewidth=1.4,
                elinewidth=0.6,
                color=colour,
                label=contender.name,
            )
            for step, x, y in zip(curves.steps, likeness, alignment, strict=True):
                axis.annotate(
                    str(step), (x.mean, y.mean), fontsize=6, xytext=(3, 3), textcoords="offset points"
                )
        axis.set_title(f"rank {rank}")
        axis.set_xlabel("likeness of the concept (name alone)")
        axis.grid(visible=True, alpha=0.25)
    axes[0][0].set_ylabel("prompt alignment")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    mpl.rcParams["svg.hashsalt"] = "comparison"
    figure.savefig(file, metadata={"Date": None})
    figure.savefig(file.with_suffix(".png"), dpi=110)
    plt.close(figure)
