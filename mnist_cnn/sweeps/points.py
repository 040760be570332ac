"""Points of a grid: the runs that differ in their seed alone, and what is known of them."""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_cnn.run.errors import UserError, nearest
from mnist_cnn.sweeps.axes import SEED
from mnist_cnn.sweeps.ledger import Run, write_csv


def show_metric(value: float | None, key: str = "") -> str:
    """A metric as tables show it: whole epochs and seconds, four decimals of others, four digits of small ones."""
    decimals = ".0f" if key in ("epochs", "seconds") else ".4g" if value and abs(value) < 0.001 else ".4f"
    return "" if value is None or math.isnan(value) else f"{value:{decimals}}"


@dataclass
class Repeats:
    """The runs of a point, the best first. Without seeds in the grid each point has one run."""

    runs: list[Run]

    def values(self, metric: str) -> list[float]:
        """The metric of each finished run."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]

    def mean(self, metric: str) -> float:
        """The mean over the finished runs; NaN if there is none."""
        return statistics.fmean(values) if (values := self.values(metric)) else math.nan

    def deviation(self, metric: str) -> float:
        """The sample standard deviation over the finished runs; NaN of fewer than two, or if one is not finite."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan

    def show(self, metric: str) -> str:
        """The mean, with the standard deviation if there are several seeds."""
        mean, deviation = self.mean(metric), self.deviation(metric)
        shown = show_metric(mean, metric)
        if math.isnan(deviation) or metric in ("epochs", "seconds"):
            return shown
        return f"{shown} ± {f'{deviation:.4f}' if abs(mean) >= 0.001 else show_metric(deviation)}"

    def difference(self, other: "Repeats", metric: str) -> tuple[float, float]:
        """The difference of the two means, and its standard error."""
        errors = [each.deviation(metric) / math.sqrt(len(each.values(metric)) or 1) for each in (self, other)]
        return self.mean(metric) - other.mean(metric), math.hypot(*errors)


def rank(runs: list[Run], metric: str, mode: str) -> list[Repeats]:
    """The points of the runs, sorted by the metric's mean; checks the metric's name, if any run has metrics."""
    known = dict.fromkeys(key for run in runs for key in run.metrics)
    if known and metric not in known:
        raise UserError(f"no run has the metric {metric}{nearest(metric, known) or '; known: ' + ', '.join(known)}")
    sign, points = -1 if mode == "max" else 1, dict[str, Repeats]()
    for run in sorted(runs, key=lambda run: (sign * run.metrics.get(metric, sign * math.inf), run.name)):
        others = json.dumps({key: value for key, value in run.swept.items() if key != SEED})
        points.setdefault(others if SEED in run.swept else run.name, Repeats([])).runs.append(run)
    return sorted(points.values(), key=lambda point: (math.isnan(mean := sign * point.mean(metric)), mean))


def has_seeds(points: list[Repeats]) -> bool:
    """Whether a point has several runs."""
    return any(len(point.runs) > 1 for point in points)


def compare(points: list[Repeats], metric: str) -> str:
    """What is known of the best point: `best 0.9841 ± 0.0009 (5 seeds); 3 others are within one standard error`."""
    best, *others = points
    known = [best.difference(other, metric) for other in others]
    within = sum(abs(difference) <= error for difference, error in known)
    noun, unknown = "other is" if within == 1 else "others are", sum(math.isnan(error) for _, error in known)
    seeds = len(best.values(metric))
    found = f"best {best.show(metric)} ({seeds} seed{'s' * (seeds != 1)})"
    found += f"; {within} {noun} within one standard error" if others else ""
    return f"{found}; {unknown} cannot be compared: too few seeds" if unknown else found


def write_points(root: Path, points: list[Repeats]) -> None:
    """Writes results_by_point.csv: one row per point with swept values, seeds, means and standard deviations."""
    rows: list[dict[str, Any]] = []
    for point in points:
        row = {key: value for key, value in point.runs[0].swept.items() if key != SEED}
        row["seeds"] = sum(run.status == "finished" for run in point.runs)
        for metric in dict.fromkeys(key for run in point.runs for key in run.metrics):
            row |= {metric: point.mean(metric), f"{metric} std": point.deviation(metric)}
        rows.append({key: "" if value != value else value for key, value in row.items()})  # NaN
    write_csv(root / "results_by_point.csv", rows)
