"""What a sweep prints: progress while it runs, a table of its runs at the end."""

import math
import shutil
import sys
import time
from collections import Counter
from datetime import timedelta

from mnist_cnn.run.errors import UserError, nearest
from mnist_cnn.sweeps.grid import swept_labels
from mnist_cnn.sweeps.ledger import Run, run_number


def sort_runs(runs: list[Run], metric: str, mode: str) -> list[Run]:
    """The runs, the best first, those without the metric last; checks the metric's name, if any run has metrics."""
    known = dict.fromkeys(key for run in runs for key in run.metrics)
    if known and metric not in known:
        raise UserError(f"no run has the metric {metric}{nearest(metric, known) or '; known: ' + ', '.join(known)}")
    sign = -1 if mode == "max" else 1
    return sorted(runs, key=lambda run: (sign * run.metrics.get(metric, sign * math.inf), run.name))


def show_metric(value: float | None, key: str = "") -> str:
    """A metric as tables show it: whole epochs and seconds, four decimals of others, four digits of small ones."""
    decimals = ".0f" if key in ("epochs", "seconds") else ".4g" if value and abs(value) < 0.001 else ".4f"
    return "" if value is None else f"{value:{decimals}}"


class Display:
    """One line per run and, on a terminal, last lines that are redrawn: the sweep's progress and the running jobs."""

    def __init__(self, metric: str, mode: str) -> None:
        self.metric, self.mode = metric, mode
        self.start, self.progress = time.time(), ""
        self.done_before: int | None = None  # runs that had ended when this process began
        self.drawn = 0  # lines that are redrawn

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        print(f"{self.erase()}{line}", flush=True)

    def show(self, *jobs: str) -> None:
        """Redraws the last lines: the progress, and a line for each running job."""
        if sys.stdout.isatty():
            columns, rows = shutil.get_terminal_size()
            lines = [line.expandtabs()[: columns - 1] for line in (self.progress, *jobs)][: rows - 1]
            print(self.erase() + "\n".join(lines), end="", flush=True)
            self.drawn = len(lines)

    def erase(self) -> str:
        """What moves a terminal's cursor to the first of the redrawn lines, and erases these."""
        up, self.drawn = self.drawn - 1, 0
        return "\r" + "\x1b[A" * up + "\x1b[J" if up >= 0 else ""

    def update(self, runs: list[Run], ended: Run | None) -> None:
        """Computes the progress from the state of all runs, and prints a line about one that has just ended."""
        states = Counter(run.status for run in runs)
        done = states["finished"] + states["failed"]
        self.done_before = done if self.done_before is None else self.done_before
        count, parts = f"[{done:{len(str(len(runs)))}}/{len(runs)}]", []
        if states["finished"]:
            best = sort_runs(runs, self.metric, self.mode)[0]
            parts.append(f"best {show_metric(best.metrics.get(self.metric))} ({run_number(best.name)})")
        if self.done_before < done < len(runs):
            seconds = (time.time() - self.start) / (done - self.done_before) * (len(runs) - done)
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        if states["failed"]:
            parts.append(f"{states['failed']} failed")
        if ended:
            value = show_metric(ended.metrics.get(self.metric))
            result = f"{self.metric} {value}" if ended.status == "finished" else f"{ended.status}: {ended.reason}"
            self.say("  ".join([count, ended.name.ljust(max(len(run.name) for run in runs)), result, *parts]))
        self.progress = "  ".join([f"{'━' * (20 * done // len(runs)):20} {count}", *parts])

    def print_table(self, runs: list[Run]) -> None:
        """Prints one row per run: number, status if these differ, swept values, metrics, as far as a row has room."""
        labels, table, width = swept_labels(runs), [], shutil.get_terminal_size((200, 24)).columns
        for run in runs:
            metrics = {key: show_metric(value, key) for key, value in run.metrics.items()}
            status = {"status": run.status} if len({run.status for run in runs}) > 1 else {}
            table.append({"run": run_number(run.name)} | status | labels[run.name] | metrics)
        columns = list(dict.fromkeys(column for row in table for column in row))
        rows = [columns, *([row.get(column, "") for column in columns] for row in table)]
        lengths = [max(map(len, cells)) for cells in zip(*rows)]
        for row in rows:
            self.say("  ".join(cell.ljust(length) for cell, length in zip(row, lengths))[:width].rstrip())
