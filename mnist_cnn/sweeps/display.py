"""What a sweep prints: progress while it runs, a table of its runs at the end."""

import itertools
import math
import shutil
import sys
import time
from collections import Counter
from datetime import timedelta
from typing import Literal

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


class Display:
    """One line per run and, on a terminal, a last line that is redrawn: the sweep's progress and the current run."""

    def __init__(self, metric: str, mode: Literal["max", "min"]) -> None:
        self.metric, self.mode = metric, mode
        self.start, self.ended, self.progress = time.time(), 0, ""
        self.erase = "\r\x1b[K" if sys.stdout.isatty() else ""

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        print(f"{self.erase}{line}", flush=True)

    def show(self, current: str) -> None:
        """Redraws the last line."""
        if self.erase:
            line = f"{self.progress}  {current}".expandtabs()[: shutil.get_terminal_size().columns - 1]
            print(f"{self.erase}{line}", end="", flush=True)

    def update(self, runs: list[Run], ended: Run | None = None) -> None:
        """Computes the progress from the state of all runs, and prints a line about one that has just ended."""
        print(end=self.erase, flush=True)  # of an error in the metric's name, which sort_runs finds
        states = Counter(run.status for run in runs)
        done, self.ended = states["finished"] + states["failed"], self.ended + bool(ended)
        count, parts = f"[{done:{len(str(len(runs)))}}/{len(runs)}]", []
        if states["finished"]:
            best = sort_runs(runs, self.metric, self.mode)[0]
            parts.append(f"best {self.value(best)} ({run_number(best.name)})")
        if self.ended and done < len(runs):
            seconds = (time.time() - self.start) / self.ended * (len(runs) - done)
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        if states["failed"]:
            parts.append(f"{states['failed']} failed")
        if ended:
            result = f"{ended.status}: {ended.reason}"
            if ended.status == "finished":
                result = f"{self.metric} {self.value(ended)}  {ended.metrics.get('seconds', 0):.0f} s"
            self.say("  ".join([count, ended.name.ljust(max(len(run.name) for run in runs)), result, *parts]))
        bar = "\u2501" * (20 * done // len(runs))
        self.progress = "  ".join([f"{bar:20} {count}", *parts])

    def value(self, run: Run) -> str:
        """The run's metric."""
        return f"{run.metrics.get(self.metric, math.nan):.4f}"

    def print_table(self, runs: list[Run], rows: int = 20) -> None:
        """Prints one row per run: number, swept values, metrics; as many columns as fit."""
        labels, table, width = swept_labels(runs), [], shutil.get_terminal_size((160, 24)).columns
        for run in runs[:rows]:
            decimals = {key: 0 if key in ("epochs", "seconds") else 4 for key in run.metrics}
            metrics = {key: f"{value:.{decimals[key]}f}" for key, value in run.metrics.items()}
            table.append({"run": run_number(run.name)} | labels[run.name] | metrics)
        lines = [""] * (1 + len(table))
        for column in dict.fromkeys(itertools.chain(*table)):
            cells = [column, *(row.get(column, "") for row in table)]
            wider = [line + cell.ljust(2 + max(map(len, cells))) for line, cell in zip(lines, cells)]
            if len(wider[0]) > width + 2:
                break
            lines = wider
        for line in lines:
            self.say(line.rstrip())
        if len(runs) > rows:
            self.say(f"and {len(runs) - rows} more")
