"""What a sweep prints: progress while it runs, a table of its runs at the end."""

import datetime
import itertools
import math
import sys
import time
from collections.abc import Iterable
from typing import Any, Literal

from mnist_cnn.sweeps.grid import short_names, swept_labels
from mnist_cnn.sweeps.ledger import Run, run_number


def sort_runs(runs: Iterable[Run], metric: str, mode: str) -> list[Run]:
    """The finished runs, the best first, those without the metric last."""
    sign = -1 if mode == "max" else 1
    finished = [run for run in runs if run.status == "finished"]
    return sorted(finished, key=lambda run: (sign * run.metrics.get(metric, sign * math.inf), run.name))


class Display:
    """One line per run and, on a terminal, a last line that is redrawn: a bar, the sweep's progress, the current run.

    Args:
        metric: The metric that runs are compared by.
        mode: Whether a higher (max) or lower (min) value is better.
    """

    def __init__(self, metric: str, mode: Literal["max", "min"]) -> None:
        # rich is imported here because jsonargparse parses 1 as 1.0 in a process that imports rich before torch.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.metric, self.start, self.ended = metric, time.time(), 0
        self.mode: Literal["max", "min"] = mode
        self.console = Console(width=None if sys.stdout.isatty() else 160)
        bar, text = BarColumn(20), TextColumn("{task.description}", markup=False)
        # auto_refresh would start a thread, and a process with threads must not fork.
        options: dict[str, Any] = {"auto_refresh": False, "transient": True, "disable": not sys.stdout.isatty()}
        self.bar = Progress(bar, text, console=self.console, **options)
        self.task, self.progress = self.bar.add_task(""), ""

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def show(self, current: str) -> None:
        """Redraws the last line."""
        line = f"{self.progress}  {current}"[: self.console.width - 22]  # beside the bar
        self.bar.update(self.task, description=line, refresh=True)

    def update(self, runs: list[Run], ended: Run | None = None) -> None:
        """Computes the progress from the state of all runs, and prints a line about one that has just ended."""
        best = sort_runs(runs, self.metric, self.mode)
        failed = sum(run.status == "failed" for run in runs)
        done, self.ended = len(best) + failed, self.ended + bool(ended)
        count = f"[{done:{len(str(len(runs)))}}/{len(runs)}]"
        parts = [f"best {self.value(best[0])} ({run_number(best[0].name)})"] if best else []
        if self.ended and done < len(runs):
            parts.append(f"{duration((time.time() - self.start) / self.ended * (len(runs) - done))} left")
        parts += [f"{failed} failed"] if failed else []
        if ended:
            result = f"{ended.status}: {ended.reason}"
            if ended.status == "finished":
                result = f"{self.metric} {self.value(ended)}  {ended.metrics.get('seconds', 0):.0f} s"
            self.say("  ".join([count, ended.name.ljust(max(len(run.name) for run in runs)), result, *parts]))
        self.progress = "  ".join([count, *parts])
        self.bar.update(self.task, total=len(runs), completed=done)

    def value(self, run: Run) -> str:
        """The run's metric."""
        return f"{run.metrics.get(self.metric, math.nan):.4f}"

    def print_table(self, runs: list[Run], rows: int = 20) -> None:
        """Prints one row per run: number, swept values, metrics; as many columns as fit."""
        labels, axes = swept_labels(runs), short_names(dict.fromkeys(key for run in runs for key in run.swept))
        metrics = dict.fromkeys(itertools.chain(*(run.metrics for run in runs[:rows])))
        formats = {key: ".0f" if key in ("epochs", "seconds") else ".4f" for key in metrics}
        table = [["run", *axes.values(), *metrics]]
        for run in runs[:rows]:
            numbers = [format(run.metrics[key], formats[key]) if key in run.metrics else "" for key in metrics]
            table.append([run_number(run.name), *(labels[run.name].get(key, "") for key in axes), *numbers])
        widths = [max(map(len, column)) for column in zip(*table)]
        fit = sum(end <= self.console.width + 2 for end in itertools.accumulate(width + 2 for width in widths))
        for row in table if runs else ():
            self.say("  ".join(cell.ljust(width) for cell, width in zip(row[:fit], widths)).rstrip())
        if len(runs) > rows:
            self.say(f"and {len(runs) - rows} more")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(datetime.timedelta(seconds=round(seconds)))
