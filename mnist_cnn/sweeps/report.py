"""Writes a sweep's report.html: the best run, all runs, the influence of each setting, and the curves.

sweep.py writes it after the last run, `python -m mnist_cnn.sweeps.report logs/sweeps/NAME` at any time.
"""

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.graph_objects as go
from jsonargparse import auto_cli
from plotly import colors, offline
from tensorboard.compat.proto.event_pb2 import Event

from mnist_cnn.run.errors import Parser, UserError, fail
from mnist_cnn.run.files import write_atomically
from mnist_cnn.sweeps.axes import SEED
from mnist_cnn.sweeps.grid import swept_labels
from mnist_cnn.sweeps.ledger import Run, read_sweep, run_number
from mnist_cnn.sweeps.points import Repeats, compare, has_seeds, rank, show_metric
from mnist_cnn.sweeps.search import open_study

LAYOUT = {"template": "plotly_white", "height": 500, "margin_t": 80}
Curve = dict[int, float]  # step -> value
Labels = dict[str, dict[str, str]]  # run -> setting -> label of its value


def report(folder: Path) -> Path:
    """Writes report.html into a sweep's folder, whatever the state of its runs; returns its path.

    Args:
        folder: The sweep's folder, logs/sweeps/NAME.
    """
    settings, runs = read_sweep(folder)
    metric, mode = settings["metric"], settings["mode"]
    points = rank(runs, metric, mode)
    ranked = [run for point in points for run in point.runs]
    finished = [run for run in ranked if metric in run.metrics]
    known = [point for point in points if point.values(metric)]
    labels = dict(zip((run.name for run in runs), swept_labels([run.swept for run in runs])))
    groups = values_of_settings(points, labels, metric)
    shares = {name: explained(*of_setting.values()) for name, of_setting in groups.items()}
    seeded = known if has_seeds(points) else []
    of_points = explained(*(point.values(metric) for point in known))  # of the variance of all runs
    events = [read_events(folder / run.name) for run in finished]
    losses, verdict = compare_losses(events[0][0]) if finished else ({}, "")
    tag = next((tag for tag in ("val/loss", "val_loss") if any(tag in curves for curves, _ in events)), metric)
    curves = {run_number(run.name): of_run[tag] for run, (of_run, _) in zip(finished, events) if tag in of_run}
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Template(template, autoescape=True, trim_blocks=True, lstrip_blocks=True).render(
        settings,
        folder=folder,
        runs=ranked,
        finished=finished,
        labels=labels,
        swept=dict.fromkeys(name for run in runs for name in labels[run.name]),
        metrics=dict.fromkeys(key for run in ranked for key in run.metrics),
        groups=groups,
        points=seeded,
        compared=compare(known, metric) if known else "",
        lead=known[0].difference(known[1], metric) if len(known) > 1 else None,
        of_seeds=None if of_points is None or len({run.metrics[metric] for run in finished}) == 1 else 1 - of_points,
        seeds_plot=draw_seeds(seeded[:10], metric),
        shares=sorted(shares.items(), key=lambda share: share[1] or 0, reverse=True),
        pictures=events[0][1] if finished else {},
        verdict=verdict,
        losses_plot=draw_curves(losses, "loss"),
        search_plots=draw_search(folder, settings) if finished and settings.get("search") else [],
        parallel_plot=draw_parallel([run for run in runs if metric in run.metrics], labels, metric, mode),
        curve=tag,
        curves_plot=draw_curves(curves, tag),
        missing=len(finished) - len(curves),
        plotly=offline.get_plotlyjs(),
        number=run_number,
        show=show_metric,
    )
    with write_atomically(folder / "report.html") as file:
        file.write(page)
    return folder / "report.html"


def values_of_settings(points: list[Repeats], labels: Labels, metric: str) -> dict[str, dict[str, list[float]]]:
    """Setting -> label of its value -> mean metric of each point that has it; without the seeds."""
    groups: dict[str, dict[str, list[float]]] = {}
    for point in sorted(points, key=lambda point: point.runs[0].name):
        for name, label in labels[point.runs[0].name].items():
            values = groups.setdefault(name, {}).setdefault(label, [])
            values += [point.mean(metric)] if point.values(metric) else []
    return {name: of_setting for name, of_setting in groups.items() if name != SEED}


def read_records(file: Path) -> Iterator[Event]:
    """Reads the events of a TensorBoard file: each is a length of 8 bytes, a checksum of 4, the event, a checksum of 4.

    TensorBoard's own reader verifies the checksums in Python: 0.16 s for a run of configs/sweep.yaml, 0.006 s here.
    """
    content, start = file.read_bytes(), 0
    while start + 12 <= len(content):
        start, end = start + 12, start + 12 + int.from_bytes(content[start : start + 8], "little")
        if end <= len(content):  # the last event of a run that was killed may be cut off
            yield Event.FromString(content[start:end])
        start = end + 4


def read_events(run_dir: Path) -> tuple[dict[str, Curve], dict[str, str]]:
    """Reads a run's TensorBoard events: tag -> finite values of a scalar; tag -> last PNG of a picture, in base64."""
    curves: dict[str, Curve] = {}
    pictures: dict[str, str] = {}
    for file in sorted(run_dir.rglob("events.out.tfevents.*")):
        for event in read_records(file):
            for value in event.summary.value:
                if value.HasField("simple_value") and np.isfinite(value.simple_value):
                    curves.setdefault(value.tag, {})[event.step] = value.simple_value
                elif value.HasField("image"):
                    pictures[value.tag] = base64.b64encode(value.image.encoded_image_string).decode()
    return curves, pictures


def compare_losses(curves: dict[str, Curve]) -> tuple[dict[str, Curve], str]:
    """The losses of training (means between validations) and validation, and a verdict; empty below two points."""
    train, val = ("train/loss", "val/loss") if "val/loss" in curves else ("train_loss", "val_loss")
    trained, validated = {}, curves.get(val, {})
    for start, end in zip([-1, *validated], validated):
        if values := [value for step, value in curves.get(train, {}).items() if start < step <= end]:
            trained[end] = float(np.mean(values))
    if len(trained) < 2:
        return {}, ""
    losses = {train: trained, val: {step: validated[step] for step in trained}}
    lowest, last = min(reversed(trained), key=validated.__getitem__), max(trained)
    fell, rose = (f"from {show_metric(curve[lowest])} to {show_metric(curve[last])}" for curve in losses.values())
    if validated[last] - validated[lowest] <= 0.01 * abs(validated[lowest]):
        verdict = f"No sign of overfitting: {val} rose by less than 1 % since step {lowest}, where it was lowest."
    elif trained[last] >= trained[lowest]:
        verdict = f"No sign of overfitting: since {val} was lowest, at step {lowest}, {train} did not fall."
    else:
        verdict = f"Sign of overfitting: since step {lowest}, {val} rose {rose} while {train} fell {fell}."
    gap = show_metric(validated[last] - trained[last])
    return losses, f"{verdict} The gap at the end, {val} minus {train}, is {gap}."


def explained(*groups: list[float]) -> float | None:
    """The share of the variance of the values' ranks that groups explain; None if each has one value.

    It is epsilon squared (Kelley 1935). Of ranks, so that one run that did not learn does not outweigh all others.
    """
    values, count = [value for group in groups for value in group], sum(map(bool, groups))
    if count == len(values):
        return None
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # the mean rank of equal values
    parts = np.split(ranks, np.cumsum([len(group) for group in groups])[:-1])
    within = sum(len(part) * np.var(part) for part in parts if len(part)) / (len(values) - count)
    return max(0.0, float(1 - within / np.var(ranks, ddof=1))) if len(counts) > 1 else 0.0


def draw_parallel(runs: list[Run], labels: Labels, metric: str, mode: str) -> go.Figure:
    """Draws runs, in the order of the grid, as lines through their metric and settings; the best one is darkest.

    The runs lie side by side, in the order of the metric: on its axis, and at each value of a setting.
    """
    metrics = [run.metrics[metric] for run in runs]
    ranks = np.argsort(np.argsort(metrics))
    places = np.unique(np.linspace(0, len(runs) - 1, 9).round())
    shown = [show_metric(sorted(metrics)[int(place)]) for place in places] if runs else []
    axes: list[dict[str, Any]] = [{"label": metric, "values": ranks, "tickvals": places, "ticktext": shown}]
    spread = 0.7 * (ranks / max(1, len(runs) - 1) - 0.5)  # of the distance of two values
    for name in dict.fromkeys(name for run in runs for name in labels[run.name]):
        column = [labels[run.name].get(name, "") for run in runs]
        ticks = list(dict.fromkeys(column))
        with contextlib.suppress(ValueError):  # others keep the order of the grid
            ticks.sort(key=float)
        positions = [ticks.index(label) + offset for label, offset in zip(column, spread)]
        shown = ticks[:: len(ticks) // 20 + 1]  # as many as are legible
        placed = {"values": positions, "range": [-0.5, len(ticks) - 0.5], "tickvals": [*map(ticks.index, shown)]}
        axes.append({"label": name, "ticktext": shown} | placed)
    line = {"color": ranks, "colorscale": "Blues", "reversescale": mode == "min"}
    return go.Figure(go.Parcoords(dimensions=axes, line=line), LAYOUT | {"font_size": 18})


def draw_seeds(points: list[Repeats], metric: str) -> go.Figure:
    """Draws a column of dots for each point, a dot for each of its runs."""
    figure = go.Figure(layout=LAYOUT | {"yaxis_title": metric, "xaxis_title": "point", "xaxis_type": "category"})
    for point in points:
        values, number = point.values(metric), run_number(point.runs[0].name)
        names = [run.name for run in point.runs if metric in run.metrics]
        marker = {"color": "#1f77b4", "size": 9, "opacity": 0.7}
        figure.add_scatter(x=[number] * len(values), y=values, text=names, mode="markers", marker=marker)
    return figure.update_layout(showlegend=False)


def draw_search(folder: Path, settings: dict[str, Any]) -> list[go.Figure]:
    """Draws Optuna's history of the best metric, and its slices: the metric over each setting."""
    study, metric = open_study(folder, settings)[0], settings["metric"]
    from optuna.visualization import plot_optimization_history, plot_slice

    return [draw(study, target_name=metric).update_layout(LAYOUT) for draw in (plot_optimization_history, plot_slice)]


def draw_curves(curves: dict[str, Curve], title: str) -> go.Figure:
    """Draws curves over the steps of training: the first one red and in front, others blue, the next darkest."""
    values = [value for curve in curves.values() for value in curve.values()]
    is_log = 0 < 10 * min(values, default=0) < max(values, default=0)  # a short log axis would have no labels
    axis = {"title": title} | ({"type": "log", "tickformat": ".3~g"} if is_log else {"exponentformat": "power"})
    figure = go.Figure(layout=LAYOUT | {"xaxis_title": "step", "yaxis": axis, "hoverlabel_namelength": -1})
    shades = colors.sample_colorscale("Blues", np.linspace(1, 0.2, len(curves)))
    for place, (name, curve) in enumerate(curves.items()):
        line = {"color": shades[place - 1], "width": 1.5} if place else {"color": "#d62728", "width": 3}
        mode = "lines" if len(curve) > 1 else "markers"
        figure.add_scatter(x=[*curve], y=[*curve.values()], name=name, mode=mode, line=line, zorder=-place)
    return figure


if __name__ == "__main__":
    try:
        print(auto_cli(report, parser_class=Parser, description="Writes a sweep's report.html."))
    except (UserError, OSError) as error:
        fail(str(error))
