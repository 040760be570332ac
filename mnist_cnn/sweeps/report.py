"""Writes a sweep's report.html: the best run, all runs, the influence of each setting, and the curves.

    python -m mnist_cnn.sweeps.report logs/sweeps/NAME

sweep.py calls `report` after the last run. The page contains all that it shows, so it opens without a network.
"""

import base64
import json
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jsonargparse import auto_cli
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from mnist_cnn.run.errors import Parser, UserError, fail, nearest
from mnist_cnn.run.files import write_atomically
from mnist_cnn.sweeps.grid import short_names, swept_labels
from mnist_cnn.sweeps.ledger import Run, read_runs, read_settings, run_number

try:
    import jinja2
    import optuna
    import plotly.graph_objects as go
    from markupsafe import Markup
    from plotly import colors, offline
except ImportError as error:
    if __name__ == "__main__":
        fail(f"{error.name} is missing: pip install '.[report]'")
    raise

Curve = list[tuple[int, float]]  # (step, value)


def report(folder: Path, metric: str | None = None, mode: Literal["max", "min"] | None = None) -> Path:
    """Writes report.html into a sweep's folder, whatever the state of its runs.

    Args:
        folder: The sweep's folder, logs/sweeps/NAME.
        metric: The metric that runs are compared by; if null, that of sweep.yaml, or val/acc.
        mode: Whether a higher (max) or a lower (min) metric is better; if null, that of sweep.yaml, or max.

    Returns:
        The path of the page.
    """
    saved = {"metric": "val/acc", "mode": "max", "program": "main:main"} | read_settings(folder)
    metric, mode = metric or saved["metric"], mode or saved["mode"]
    runs = read_runs(folder, metric)
    known = dict.fromkeys(key for run in runs for key in run.metrics)
    if not runs:
        raise UserError(f"{folder} is not the folder of a sweep: it has no configs/*.yaml")
    if known and metric not in known:
        raise UserError(f"no run has the metric {metric}{nearest(metric, known) or '; known: ' + ', '.join(known)}")
    finished = [run for run in runs if metric in run.metrics]
    finished.sort(key=lambda run: run.metrics[metric], reverse=mode == "max")
    sections = show_settings(runs, metric, mode)
    if finished:
        events = {run.name: read_events(folder / run.name) for run in finished}
        sections |= show_best(folder / finished[0].name, *events[finished[0].name])
        sections |= show_curves({name: curves for name, (curves, _) in events.items()}, metric)
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Template(template, autoescape=True, trim_blocks=True, lstrip_blocks=True).render(
        sections,
        folder=folder,
        script=saved["program"].partition(":")[0].replace(".", "/") + ".py",
        metric=metric,
        mode=mode,
        runs=[*finished, *(run for run in runs if metric not in run.metrics)],
        finished=finished,
        metrics=list(dict.fromkeys([metric, *known])) if finished else [],
        plotly=Markup(offline.get_plotlyjs()),
        now=datetime.now(),
        number=run_number,
        quote=shlex.quote,
    )
    with write_atomically(folder / "report.html") as file:
        file.write(page)
    return folder / "report.html"


def read_events(run_dir: Path) -> tuple[dict[str, Curve], dict[str, str]]:
    """Reads a run's TensorBoard events: tag -> curve of each scalar; tag -> last PNG of each picture, in base64."""
    curves: dict[str, Curve] = {}
    pictures: dict[str, str] = {}
    for file in sorted(run_dir.rglob("events.out.tfevents.*")):
        # EventFileLoader would also convert the histograms, which doubles the time.
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    curves.setdefault(value.tag, []).append((event.step, value.simple_value))
                elif value.HasField("image"):
                    pictures[value.tag] = base64.b64encode(value.image.encoded_image_string).decode()
    return curves, pictures


def show_best(run_dir: Path, curves: dict[str, Curve], pictures: dict[str, str]) -> dict[str, Any]:
    """The best run: its checkpoint, losses and pictures."""
    checkpoint = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8")).get("best_checkpoint")
    losses = losses_of(curves)
    verdict = overfitting(*losses.items()) if len(losses) == 2 else ""
    shown = {"checkpoint": checkpoint, "losses": losses, "verdict": verdict, "pictures": pictures}
    return shown | {"losses_plot": draw_curves(losses, "loss")}


def show_settings(runs: list[Run], metric: str, mode: str) -> dict[str, Any]:
    """The settings: values, means by value, share of the variance, parallel coordinates."""
    finished = [run for run in runs if metric in run.metrics]
    metrics = [run.metrics[metric] for run in finished]
    names = short_names(dict.fromkeys(key for run in runs for key in run.swept))
    labels = {run: {names[key]: label for key, label in swept.items()} for run, swept in swept_labels(runs).items()}
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in names.values()}
    for run in runs:
        for name, label in labels[run.name].items():
            scores[name].setdefault(label, []).extend([run.metrics[metric]] if metric in run.metrics else [])
    different = len(set(metrics)) > 1
    varied = [key for key, name in names.items() if different and sum(map(bool, scores[name].values())) > 1]
    shares = {names[key]: explained(*scores[names[key]].values()) for key in varied}
    directions = {names[key]: direction([run.swept.get(key) for run in finished], metrics) for key in varied}
    points = [{names[key]: labels[run.name].get(names[key], "") for key in varied} for run in finished]
    return {
        "labels": labels,
        "scores": scores,
        "total": sum(shares.values()),
        "shares_plot": draw_shares(shares, directions, metric) if varied else "",
        "parallel_plot": draw_parallel(points, metrics, metric, mode) if varied else "",
    }


def show_curves(curves: dict[str, dict[str, Curve]], metric: str) -> dict[str, Any]:
    """The curves of all runs: the validation loss, or else the metric."""
    tag = next((tag for tag in ("val/loss", "val_loss") if any(tag in run for run in curves.values())), metric)
    chosen = {name: without_evaluation(run[tag]) for name, run in curves.items() if tag in run}
    return {"curve": tag, "curves": chosen, "curves_plot": draw_curves(chosen, tag, ranked=True)}


def without_evaluation(curve: Curve) -> Curve:
    """Removes the evaluation of the best checkpoint from a curve's end: an earlier value, at most one step later."""
    while len(curve) > 1 and curve[-1][0] <= curve[-2][0] + 1 and curve[-1][1] in (value for _, value in curve[:-1]):
        curve = curve[:-1]
    return curve


def losses_of(curves: dict[str, Curve]) -> dict[str, Curve]:
    """Picks the losses of training and validation; the former as its mean since the previous validation."""
    tags = [tag for tag, curve in curves.items() if tag.endswith("loss") and len(curve) > 1]
    train, val = (next((tag for tag in tags if tag.startswith(stage)), "") for stage in ("train", "val"))
    losses = {tag: without_evaluation(curves[tag]) for tag in (train, val) if tag}
    if train and val:
        ends = [step for step, _ in losses[val]]
        values = [[v for step, v in curves[train] if start < step <= end] for start, end in zip([-1, *ends], ends)]
        losses[train] = [(end, float(np.mean(some))) for end, some in zip(ends, values) if some]
    return {tag: curve for tag, curve in losses.items() if curve}


def overfitting(training: tuple[str, Curve], validation: tuple[str, Curve]) -> str:
    """Says whether the losses of training and validation show overfitting."""
    (train, train_curve), (val, val_curve) = training, validation
    step, lowest = min(val_curve, key=lambda point: point[1])
    then = next((value for at, value in train_curve if at >= step), train_curve[-1][1])
    rise, trend = val_curve[-1][1] - lowest, train_curve[-1][1] - then
    if rise > 0 > trend:
        return f"Sign of overfitting: since step {step}, {val} rose by {rise:.4f} while {train} fell by {-trend:.4f}."
    reason = f"{train} did not fall since step {step}, where {val} was lowest" if rise else f"{val} fell to the end"
    return f"No sign of overfitting: {reason}."


def direction(values: list[Any], metrics: list[float]) -> str:
    """Says whether a metric is higher or lower for higher values of a setting, by their correlation."""
    if not all(isinstance(value, int | float) for value in values):
        return "categorical"
    return "higher" if np.corrcoef(np.array(values, float), metrics)[0, 1] > 0 else "lower"


def explained(*groups: list[float]) -> float:
    """The share of the variance that lies between groups: eta squared, the square of Pearson's correlation ratio."""
    means = [np.full(len(group), np.mean(group)) for group in groups if group]
    return float(np.var(np.concatenate(means)) / np.var(np.concatenate(groups)))


def draw_shares(shares: dict[str, float], directions: dict[str, str], metric: str) -> Markup:
    """Draws the share of the variance that each setting explains, coloured by the setting's direction."""
    figure = go.Figure(layout={"xaxis_title": "share of the variance", "height": 150 + 40 * len(shares)})
    for kind, color in {"higher": "#1f77b4", "lower": "#ff7f0e", "categorical": "#888888"}.items():
        bars = {name: share for name, share in shares.items() if directions[name] == kind}
        label = kind if kind == "categorical" else f"higher values (or true) → {kind} {metric}"
        figure.add_bar(x=list(bars.values()), y=list(bars), name=label, marker_color=color, orientation="h")
    figure.update_traces(texttemplate="%{x:.2f}", textposition="outside", showlegend=True)
    return to_html(figure.update_yaxes(categoryorder="array", categoryarray=sorted(shares, key=shares.__getitem__)))


def draw_parallel(points: list[dict[str, str]], values: list[float], metric: str, mode: str) -> Markup:
    """Draws each run as a line through its settings, all of them categorical, by Optuna."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
    choices = {name: list(dict.fromkeys(point[name] for point in points)) for name in points[0]}
    axes: Any = {name: optuna.distributions.CategoricalDistribution(labels) for name, labels in choices.items()}
    for point, value in zip(points, values):
        study.add_trial(optuna.trial.create_trial(params=point, distributions=axes, value=value))
    return to_html(optuna.visualization.plot_parallel_coordinate(study, target_name=metric))


def draw_curves(curves: dict[str, Curve], title: str, ranked: bool = False) -> Markup | str:
    """Draws curves over the steps of training; if they are ranked, the best first, colours show the rank."""
    figure = go.Figure(layout={"xaxis_title": "step", "height": 500, "showlegend": not ranked})
    for rank, (name, curve) in enumerate(curves.items()):
        shade = colors.sample_colorscale("Blues", 1 - 0.8 * rank / len(curves))[0] if ranked else None
        line = {"color": "#d62728", "width": 3} if ranked and rank == 0 else {"color": shade, "width": 1.5}
        steps, values = zip(*curve)
        figure.add_scatter(x=steps, y=values, name=name, mode="lines", line=line, zorder=-rank)
    if all(value > 0 for curve in curves.values() for _, value in curve):
        figure.update_yaxes(type="log", tickformat=".3~g")
        title += " (log)"
    return to_html(figure.update_layout(yaxis_title=title, hoverlabel_namelength=-1)) if curves else ""


def to_html(figure: go.Figure) -> Markup:
    """Makes a figure a part of the page."""
    figure.update_layout(template="plotly_white", title=None, margin={"l": 60, "r": 30, "t": 40, "b": 50})
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False))


if __name__ == "__main__":
    try:
        print(auto_cli(report, parser_class=Parser, description="Writes a sweep's report.html."))
    except (UserError, OSError) as error:
        fail(str(error))
