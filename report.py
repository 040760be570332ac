"""Makes one page of a sweep: `python report.py logs/sweeps/NAME` writes report.html there; sweep.py does so at its end.

The page holds all that it shows, so it opens from disk, without a network. Everything comes from the sweep's folder:
settings and metrics as sweep.py reads them, curves and pictures from TensorBoard's event files, where there are any.
Optuna and Plotly draw; they and jinja2 come with `pip install '.[report]'`.
"""

import base64
import contextlib
import math
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, auto_cli

import sweep

try:
    import jinja2
    import markupsafe
    import numpy as np
    import optuna
    import plotly.graph_objects as go
    from google.protobuf.message import DecodeError
    from plotly.colors import sample_colorscale
    from plotly.offline import get_plotlyjs
    from tensorboard.compat.proto.event_pb2 import Event
except ImportError as error:
    if __name__ == "__main__":
        sys.exit(f"error: {error.name} is missing: pip install '.[report]'")
    raise

PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ root.name }}: sweep report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2em }
.wide { overflow: auto; max-height: 36em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2em .8em; text-align: left; white-space: nowrap; border-bottom: 1px solid #ddd }
th { position: sticky; top: 0; background: #f4f4f4 }
#runs th { cursor: pointer }
#runs th[data-order="1"]::after { content: " ▲" } #runs th[data-order="-1"]::after { content: " ▼" }
#runs td:first-child { position: sticky; left: 0; background: #fff } #runs .best { font-weight: bold }
code { background: #f4f4f4; padding: .1em .3em }
.pictures { display: flex; flex-wrap: wrap; gap: 1em }
figure { flex: 1 1 30em; margin: 0 }
img { max-width: 100% }
.missing { color: #a40000 }
</style>
<script>{{ plotlyjs }}</script>
<h1>Sweep {{ root.name }}</h1>
<p>{{ finished | length }} of {{ runs | length }} runs are finished
{%- for status, count in others.items() %}, {{ count }} {{ status }}{% endfor %}. Compared by {{ metric }}
({{ "more" if mode == "max" else "less" }} is better). Made {{ now }}.</p>
{% for line in missing %}<p class="missing">{{ line }}</p>{% endfor %}

{% if best %}
<h2>The best run</h2>
<p><b>{{ best.name }}</b> reached {{ metric }} {{ show(best.metrics[metric]) }}, with
{% for key, label in best.labels.items() %}{{ key }} <b>{{ label }}</b>{{ ", " if not loop.last }}{% endfor %}.</p>
<div class="wide"><table><tr>{% for key in metrics %}<th>{{ key }}{% endfor %}</tr>
<tr>{% for key in metrics %}<td>{{ show(best.metrics.get(key), key) }}{% endfor %}</tr></table></div>
{% if checkpoint %}<p>Numbers and pictures are of the best checkpoint, <code>{{ checkpoint }}</code>.</p>{% endif %}
<p>Run it again: <code>{{ best.command }}</code></p>
{% if plots.best %}<h3>{{ "Did it overfit?" if verdict else "Its losses" }}</h3>
<p>{% if verdict %}{{ verdict }} Overfitting is: the loss on validation data rises while the one on training data goes
on falling. A point of the latter is the mean since the validation before.{% endif %}
{% for name, points in losses.items() %}{{ name }} {{ show(points[-1][1]) }} at the end, at best
{{ show(points | map(attribute=1) | min) }}{{ "; " if not loop.last else "." }}{% endfor %}</p>
{{ plots.best }}{% endif %}
{% if pictures %}<h3>Its pictures in TensorBoard</h3>{% endif %}
<div class="pictures">{% for tag, picture in pictures.items() %}
<figure><figcaption>{{ tag }}</figcaption>
<img alt="{{ tag }} of the best run" src="data:image/png;base64,{{ picture }}"></figure>
{% endfor %}</div>
{% endif %}

<h2>All runs</h2>
<p>The best first. A click on a column's head sorts by it, a second one the other way round.</p>
<div class="wide"><table id="runs"><thead><tr>
{% for key in ["run", "status"] + axes + metrics + ["run it again"] %}<th>{{ key }}{% endfor %}</tr></thead><tbody>
{% for run in runs %}<tr{{ ' class="best"' | safe if run == best }}><td>{{ run.number }}<td>{{ run.status }}
{% for label in run.labels.values() %}<td>{{ label }}{% endfor %}
{% for key in metrics %}{% set value = run.metrics.get(key) %}
<td data-value="{{ "" if value is none else value }}">{{ show(value, key) }}{% endfor %}
<td><code>{{ run.command }}</code></tr>
{% endfor %}</tbody></table></div>

{% if plots.importance %}
<h2>Which setting matters</h2>
<p>How much of the variance of {{ metric }} each setting explains by itself.
{% if total < 1 and not others %}Together that is {{ "%.0f" | format(100 * total) }} %; the rest is chance, and what
settings do only in combination.{% endif %}</p>
{{ plots.importance }}
{% endif %}
{% if means %}
<h3>Mean {{ metric }} by value</h3>
<p>Over the finished runs with that value; the number of them in brackets.</p>
<div class="wide"><table>{% for key, row in means.items() %}<tr><th>{{ key }}
{% for label, mean, count in row %}<td>{{ label }}: <b>{{ show(mean) }}</b> ({{ count }}){% endfor %}
{% endfor %}</table></div>
{% endif %}
{% if plots.parallel %}
<h2>Parallel coordinates</h2>
<p>One line a run, through its settings; the darker, the better. Drag along an axis to pick out runs.</p>
{{ plots.parallel }}
{% endif %}
{% if plots.curves %}
<h2>{{ curve }} of all runs</h2>
<p>One line a run; the darker, the better, the best in red. Point at a line to see which it is.</p>
{{ plots.curves }}
{% endif %}

{% if failed %}
<h2>Failed, interrupted and damaged runs</h2>
<table><tr><th>run<th>status<th>reason<th>its output</tr>
{% for run in failed %}<tr><td>{{ run.name }}<td>{{ run.status }}<td>{{ run.reason }}<td><code>{{ run.log }}</code>
{% endfor %}</table>
{% endif %}

<script>
const body = document.querySelector("#runs tbody")
document.querySelectorAll("#runs th").forEach((head, column) => head.onclick = () => {
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent
  const order = head.dataset.order == 1 ? -1 : 1
  document.querySelectorAll("#runs th").forEach(other => delete other.dataset.order)
  head.dataset.order = order
  body.append(...[...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)]
    if (!x || !y) return !x - !y  // what has no value stays at the end
    return order * (x - y || x.localeCompare(y, undefined, {numeric: true}))
  }))
})
</script>
</html>
""",
    autoescape=True,
)


@dataclass
class Run:
    """A run of a sweep as the page shows it."""

    name: str
    number: str
    status: str
    reason: str  # why it failed
    metrics: dict[str, float]  # those of a finished run
    values: dict[str, Any]  # what was swept, by short names
    labels: dict[str, str]  # the same, as shown
    command: str  # that reruns it
    log: Path


def read_runs(root: Path, metric: str, program: str) -> list[Run]:
    """The runs of a sweep's folder, in its order."""
    names = [path.stem for path in sorted((root / "configs").glob("*.yaml"))]
    swept = {name: sweep.swept_values(root / "configs" / f"{name}.yaml") for name in names}
    shown = sweep.swept_labels(root, names)
    axes = sweep.short_names(dict.fromkeys(key for values in swept.values() for key in values))
    runs = []
    for name in names:
        status, details = sweep.status(root, name, metric)
        labels = {short: shown[name].get(key, "") for key, short in axes.items()}
        values = {short: swept[name].get(key) for key, short in axes.items()}
        config = shlex.quote(str(root / "configs" / f"{name}.yaml"))
        runs.append(
            Run(
                name=name,
                number=sweep.number(name),
                status=status,
                reason=details.get("reason", "") if status != "finished" else "",
                metrics=details if status == "finished" else {},
                values=values,
                labels=labels,
                command=f"python {sweep.script(program)} fit --config {config}",
                log=root / name / "output.log",
            )
        )
    return runs


def read_events(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, bytes]]:
    """What TensorBoard shows of a run.

    Returns:
        Tag -> points (step, value) of each scalar; tag -> the last PNG of each picture.
    """
    scalars: dict[str, list[tuple[int, float]]] = {}
    pictures: dict[str, bytes] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        with contextlib.suppress(DecodeError):  # what comes behind a damaged event is lost
            for record in records(file):
                event = Event.FromString(record)
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
                    elif value.HasField("image"):
                        pictures[value.tag] = value.image.encoded_image_string
    return scalars, pictures


def records(file: Path) -> Iterator[bytes]:
    """The records of an event file, as far as it goes. TensorBoard's own reader checks sums, in fifty times the time.

    Source: https://www.tensorflow.org/tutorials/load_data/tfrecord, TFRecords format details.
    """
    data, at = file.read_bytes(), 0
    while at + 12 <= len(data):
        start = at + 12  # behind the length and its checksum
        at = start + int.from_bytes(data[at : at + 8], "little") + 4
        if at > len(data):
            return
        yield data[start : at - 4]


def correlation(values: list[Any], metrics: list[float]) -> float:
    """Pearson's correlation of a setting and the metric; NaN if the setting has no order, or one of them one value."""
    if not all(isinstance(value, int | float) for value in values) or len(set(values)) == 1 or len(set(metrics)) == 1:
        return math.nan
    return float(np.corrcoef(np.array(values, float), metrics)[0, 1])


def to_study(runs: list[Run], metric: str, mode: str) -> optuna.Study:
    """An Optuna study that holds the finished runs; each setting is categorical, in the grid's order."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
    varied = [key for key in runs[0].labels if len({run.labels[key] for run in runs}) > 1]
    choices = {key: list(dict.fromkeys(choice(run, key) for run in runs)) for key in varied}
    distributions: Any = {key: optuna.distributions.CategoricalDistribution(choices[key]) for key in varied}
    for run in runs:
        params = {key: choice(run, key) for key in varied}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=run.metrics[metric])
        )
    return study


def choice(run: Run, key: str) -> Any:
    """A value as Optuna takes it: a number, or a name."""
    value = run.values[key]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else run.labels[key]


def by_label(runs: list[Run], key: str, metric: str) -> dict[str, list[float]]:
    """The metric of the runs that have it, for each value of a setting."""
    groups: dict[str, list[float]] = {}
    for run in runs:
        groups.setdefault(run.labels[key], []).extend([run.metrics[metric]] if metric in run.metrics else [])
    return groups


def explained(groups: Iterable[list[float]]) -> float:
    """The share of the variance that lies between groups: the correlation ratio, squared.

    Source: Pearson, On the general theory of skew correlation and non-linear regression, 1905.
    """
    groups = list(groups)
    everything = np.concatenate(groups)
    between = sum(len(group) * (np.mean(group) - everything.mean()) ** 2 for group in groups)
    return float(between / (everything.var() * len(everything)))


def draw_importance(runs: list[Run], importances: dict[str, float], metric: str) -> go.Figure:
    """How much of the metric's variance each setting explains, coloured by the sign of its correlation."""
    metrics = [run.metrics[metric] for run in runs]
    signs = {key: correlation([run.values[key] for run in runs], metrics) for key in importances}
    figure = go.Figure(layout={"xaxis_title": "share of the variance", "height": 150 + 40 * len(importances)})
    for name, color, keys in (
        (f"greater values, or true: more {metric}", "#2a7f3f", [key for key, sign in signs.items() if sign > 0]),
        (f"greater values, or true: less {metric}", "#b3382c", [key for key, sign in signs.items() if sign < 0]),
        ("has no order", "#888888", [key for key, sign in signs.items() if not abs(sign) > 0]),
    ):
        texts = [
            f"{importances[key]:.2f}, correlation {signs[key]:+.2f}".replace(", correlation +nan", "") for key in keys
        ]
        bars = [importances[key] for key in keys]
        if keys:
            figure.add_bar(x=bars, y=keys, text=texts, orientation="h", name=name, marker_color=color, showlegend=True)
    return figure.update_yaxes(categoryorder="array", categoryarray=sorted(importances, key=importances.__getitem__))


def without_best(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """A curve without what is a step behind its end: the best checkpoint's value once more."""
    while len(points) > 1 and points[-1][0] <= points[-2][0] + 1 and points[-1][1] in (v for _, v in points[:-1]):
        points = points[:-1]
    return points


def losses_of(scalars: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """The losses of training and validation, the former as its mean since the validation before: a batch's is noisy."""
    losses = {tag: points for tag, points in scalars.items() if tag.endswith("loss") and len(points) > 1}
    train, val = (next((tag for tag in losses if tag.startswith(stage)), "") for stage in ("train", "val"))
    if not (train and val):
        return {tag: without_best(losses[tag]) for tag in (train, val) if tag}
    losses = {train: [], val: without_best(losses[val])}
    start = -1
    for end, _ in losses[val]:
        since = [value for step, value in scalars[train] if start < step <= end]
        losses[train] += [(end, float(np.mean(since)))] if since else []
        start = end
    return {tag: points for tag, points in losses.items() if points}


def overfit(losses: dict[str, list[tuple[int, float]]]) -> str:
    """What the losses of training and validation, in this order, say of overfitting; nothing without both."""
    if len(losses) != 2:
        return ""
    (train, train_points), (val, val_points) = losses.items()
    step, least = min(val_points, key=lambda point: point[1])
    then = next((value for at, value in train_points if at >= step), train_points[-1][1])
    if least <= 0 or then <= 0:
        return ""
    rise, trend = val_points[-1][1] / least - 1, train_points[-1][1] / then - 1
    sign = "a sign of overfitting." if rise > 0 > trend else "no sign of overfitting."
    return f"Since {val} was least, at step {step}, it has changed by {rise:+.0%}, and {train} by {trend:+.0%}: {sign}"


def draw_curves(
    curves: dict[str, list[tuple[int, float]]], title: str, shares: dict[str, float], best: str = ""
) -> go.Figure | None:
    """Lines over the steps of training.

    Args:
        curves: Name -> points.
        title: That of the vertical axis.
        shares: Name -> how good it is, 0 to 1, which is its colour; the others get one each.
        best: The name of the one to draw in front of the others.
    """
    figure = go.Figure(layout={"xaxis_title": "step", "height": 500, "showlegend": not shares})
    figure.update_layout(hoverlabel_namelength=-1)
    for name in sorted(curves, key=lambda name: shares.get(name, 0)):
        color = sample_colorscale("Blues", 0.2 + 0.8 * shares[name])[0] if name in shares else None
        line = {"color": "#d62728", "width": 3} if name == best else {"color": color, "width": 1.5}
        steps, values = zip(*curves[name])
        figure.add_scattergl(x=steps, y=values, name=name, mode="lines", line=line)
    shown = [value for points in curves.values() for _, value in points]
    if shown and min(shown) > 0:
        digits = (1, 2, 5) if max(shown) > 5 * min(shown) else range(1, 10)
        ticks = [digit * 10.0**power for power in range(-8, 8) for digit in digits]  # Plotly's own have no powers
        figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
        title += " (log)"
    return figure.update_yaxes(title=title) if curves else None


def report(folder: Path, metric: str | None = None, mode: Literal["max", "min"] | None = None) -> Path:
    """Writes report.html into a sweep's folder, whatever the state of its runs.

    Args:
        folder: The folder, logs/sweeps/NAME.
        metric: What runs are compared by; that of sweep.yaml, or else val/acc, if null.
        mode: Whether more or less of it is better; likewise.

    Returns:
        The page.

    Raises:
        sweep.Mistake: If the folder has no configs, or no run has the metric.
    """
    saved = sweep.load_sweep(folder / "sweep.yaml")
    metric, mode = metric or saved.get("metric", "val/acc"), mode or saved.get("mode", "max")
    runs = read_runs(folder, metric, saved.get("program", "main:main"))
    if not runs:
        raise sweep.Mistake(f"{folder} is no sweep's folder: it has no configs/*.yaml")
    finished = sorted(
        (run for run in runs if metric in run.metrics), key=lambda run: run.metrics[metric], reverse=mode == "max"
    )
    known = dict.fromkeys(key for run in runs for key in run.metrics)
    if known and not finished:
        near = sweep.nearest(metric, known) or f"; there are {', '.join(known)}"
        raise sweep.Mistake(f"no run reports a metric {metric}{near}")
    for run in runs:
        if run.status == "finished" and run not in finished:
            run.status = f"finished without {metric}"
    best = finished[0] if finished else None
    others = Counter(run.status for run in runs if run.status != "finished")
    missing = [f"Not in the plots: {count} of {len(runs)} runs, {status}." for status, count in others.items()]
    files = filter(None, (sweep.damaged_file(folder / run.name) for run in finished))
    missing += [f"{file} isn't what the run wrote: the same sweep starts it over." for file in files]
    plots: dict[str, go.Figure | None] = {}
    importances: dict[str, float] = {}
    tag = metric
    losses: dict[str, list[tuple[int, float]]] = {}
    pictures: dict[str, bytes] = {}
    if best:
        events = {run.name: read_events(folder / run.name)[0] for run in finished}
        tags = {tag for scalars in events.values() for tag in scalars}
        tag = next((tag for tag in ("val/loss", "val_loss") if tag in tags), tag)
        curves = {name: without_best(scalars[tag]) for name, scalars in events.items() if tag in scalars}
        if len(curves) < len(finished):
            count = f"{len(finished) - len(curves)} of {len(finished)} finished runs"
            missing.append(f"Without {tag} in TensorBoard's event files: {count}.")
        shares = {run.name: 1 - index / len(finished) for index, run in enumerate(finished)}
        plots["curves"] = draw_curves(curves, tag, shares, best.name)
        scalars, pictures = read_events(folder / best.name)
        losses = losses_of(scalars)
        plots["best"] = draw_curves(losses, "loss", {})
        study = to_study(finished, metric, mode)
        if study.trials[0].params:
            plots["parallel"] = optuna.visualization.plot_parallel_coordinate(study, target_name=metric)
        if len({run.metrics[metric] for run in finished}) > 1:
            settings = study.trials[0].params
            importances = {key: explained(by_label(finished, key, metric).values()) for key in settings}
        if importances:
            plots["importance"] = draw_importance(finished, importances, metric)
        else:
            missing.append("There are too few different finished runs to say which setting matters.")
    means: dict[str, list[tuple[str, float, int]]] = {}
    for key in runs[0].labels:
        groups = by_label(runs, key, metric)
        means[key] = [(label, float(np.mean(some)) if some else math.nan, len(some)) for label, some in groups.items()]
    page = PAGE.render(
        root=folder.resolve(),
        runs=[*finished, *(run for run in runs if run not in finished)],
        finished=finished,
        best=best,
        losses=losses,
        others=others,
        missing=missing,
        metric=metric,
        mode=mode,
        metrics=list(dict.fromkeys(key for run in finished for key in (metric, *run.metrics))),
        axes=list(runs[0].labels),
        means=means if finished else {},
        failed=[run for run in runs if run.reason],
        checkpoint=best and (sweep.load(folder / best.name / "metrics.json") or {}).get("best_checkpoint"),
        verdict=overfit(losses),
        total=sum(importances.values()),
        curve=tag,
        pictures={tag: base64.b64encode(picture).decode() for tag, picture in pictures.items()},
        plots={name: markupsafe.Markup(to_html(figure)) for name, figure in plots.items() if figure},
        plotlyjs=markupsafe.Markup(get_plotlyjs()),
        now=datetime.now().strftime("%Y-%m-%d %H:%M"),
        show=lambda x, key="": "" if x is None or x != x else f"{x:.{0 if key in ('epochs', 'seconds') else 4}f}",
    )
    path = folder / "report.html"
    sweep.write(path, page)
    return path


def to_html(figure: go.Figure) -> str:
    """A figure as a part of the page."""
    figure.update_layout(template="plotly_white", title=None, margin={"l": 60, "r": 30, "t": 40, "b": 50})
    return figure.to_html(full_html=False, include_plotlyjs=False)


if __name__ == "__main__":
    try:
        print(auto_cli(report, exit_on_error=False))
    except ArgumentError as error:
        sys.exit(f"error: {sweep.explain(str(error), sys.argv[1:], report.__annotations__)}")
    except (sweep.Mistake, OSError) as error:
        sys.exit(f"error: {error}")
