"""metrics.jsonl → a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_dpo.training.run_log import read_metrics

STYLES: dict[str, dict[str, Any]] = {"train": {"alpha": 0.4, "linewidth": 1}, "val": {"marker": "o", "markersize": 4}}
COLOURS = ("tab:blue", "tab:red")
PANELS = {
    "loss": ("loss",),
    "accuracy": ("acc",),
    "rewards (× β)": ("rewards_chosen_mean", "rewards_rejected_mean"),
    "reward margin": ("rewards/margins",),
}


def plot_metrics(source: Path, target: Path) -> None:
    """Loss, accuracy, rewards and margin over the steps, training and validation, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(source)
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            for split, style in STYLES.items():
                points = [(row["step"], row[f"{split}/{name}"]) for row in rows if f"{split}/{name}" in row]
                if points:
                    axis.plot(*zip(*points, strict=True), label=f"{split} {name}", color=colour, **style)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
