"""What a sweep prints: progress while it runs, a table of its runs at the end."""

import shutil
import sys
import time
from collections import Counter
from datetime import timedelta

from mnist_cnn.sweeps.axes import SEED
from mnist_cnn.sweeps.grid import swept_labels
from mnist_cnn.sweeps.ledger import Run, run_number
from mnist_cnn.sweeps.points import Repeats, has_seeds, show_metric


class Display:
    """One line per run and, on a terminal, last lines that are redrawn: the sweep's progress and the running jobs."""

    def __init__(self, metric: str, mode: str) -> None:
        self.metric, self.mode = metric, mode
        self.progress, self.start = "", 0.0
        self.done_before: int | None = None  # runs that had ended at the start
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

    def update(self, points: list[Repeats], ended: Run | None, total: int) -> None:
        """Computes the progress from the runs of all points, the best first; prints a line about one that has ended."""
        runs = [run for point in points for run in point.runs]
        states = Counter(run.status for run in runs)
        done = states["finished"] + states["failed"] + states["pruned"]
        if self.done_before is None:
            self.start, self.done_before = time.time(), done
        count, parts = f"[{done:{len(str(total))}}/{total}]", []
        if states["finished"]:
            parts.append(f"best {points[0].show(self.metric)} ({run_number(runs[0].name)})")
        if self.done_before < done < total:
            seconds = (time.time() - self.start) / (done - self.done_before) * (total - done)
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        parts += [f"{states[status]} {status}" for status in ("failed", "pruned") if states[status]]
        if ended:
            value = show_metric(ended.metrics.get(self.metric))
            result = f"{self.metric} {value}" if ended.status == "finished" else f"{ended.status}: {ended.reason}"
            self.say("  ".join([count, ended.name.ljust(max(len(run.name) for run in runs)), result, *parts]))
        self.progress = "  ".join([f"{'━' * (20 * done // total):20} {count}", *parts])

    def print_table(self, points: list[Repeats]) -> None:
        """Prints a row for each point: its best run's number and status, seeds, swept values, metrics; cut to fit."""
        runs, seeded = [point.runs[0] for point in points], has_seeds(points)
        labels, has_status = swept_labels([run.swept for run in runs]), len({run.status for run in runs}) > 1
        table = []
        for point, run, swept in zip(points, runs, labels):
            cells = {"run": run_number(run.name)} | ({"status": run.status} if has_status else {})
            cells |= {"seeds": str(len(point.values(self.metric)))} if seeded else {}
            cells |= {key: label for key, label in swept.items() if not (seeded and key == SEED)}
            table.append(cells | {key: point.show(key) for key in run.metrics})
        if not table:
            return
        columns = list(dict.fromkeys(column for cells in table for column in cells))
        rows = [columns, *([cells.get(column, "") for column in columns] for cells in table)]
        lengths, width = [max(map(len, column)) for column in zip(*rows)], shutil.get_terminal_size((200, 24)).columns
        for row in rows:
            self.say("  ".join(cell.ljust(length) for cell, length in zip(row, lengths))[:width].rstrip())
