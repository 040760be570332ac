"""Executes runs on this machine, one after another, each in a process of its own."""

import contextlib
import gc
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import Timeout

from mnist_cnn.run.errors import fail
from mnist_cnn.run.folder import write_metrics
from mnist_cnn.sweeps.display import Display
from mnist_cnn.sweeps.grid import import_program
from mnist_cnn.sweeps.ledger import Run, lock, read_run, run_number, write_status

# A forked process has everything imported, and the caches that checking the configs filled: a run starts in a second.
CONTEXT: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Sweep:
    """The runs to execute, and whether to go on."""

    root: Path
    names: list[str]
    program: str
    metric: str
    start: float = field(default_factory=time.time)
    interrupts: int = 0  # how often Ctrl-C was pressed
    gave_up: bool = False  # too many runs failed in a row

    def interrupt(self, *_: Any) -> None:
        """Handles SIGINT and SIGTERM."""
        self.interrupts += 1

    def is_open(self, name: str) -> bool:
        """Whether a run is to be executed: one that failed is tried again, but only once by the same command."""
        run = read_run(self.root, name, self.metric)
        return run.status != "finished" and (run.status != "failed" or run.ended < self.start)


def run_all(sweep: Sweep, display: Display) -> Iterator[Run]:
    """Executes the runs that are not finished, and yields each; waits for those that other processes execute."""
    if any("WandbLogger" in config.read_text(encoding="utf-8") for config in (sweep.root / "configs").glob("*.yaml")):
        importlib.import_module("wandb.sdk.launch")  # W&B would import it in each run, which takes a second
    gc.freeze()  # what exists now stays in memory that the forked processes share
    while unfinished := [name for name in sweep.names if sweep.is_open(name)]:
        for name in unfinished:
            if sweep.interrupts or sweep.gave_up:
                return
            try:
                with lock(sweep.root, name, timeout=0):
                    if sweep.is_open(name):  # another process may have finished it meanwhile
                        yield execute(sweep, name, display)
            except Timeout:
                display.show(f"{run_number(name)}  is executed by another process")
                time.sleep(0.25)


def execute(sweep: Sweep, name: str, display: Display) -> Run:
    """Executes one run, whose lock this process holds, and notes why it did not finish."""
    log, forwarded = sweep.root / name / "output.log", False
    process = CONTEXT.Process(target=run_alone, args=(sweep.root, name, sweep.program))
    process.start()
    while process.is_alive():
        display.show(f"{run_number(name)}  {last_line(log)}")
        if sweep.interrupts > 1:
            with contextlib.suppress(ProcessLookupError):  # it has no group yet
                os.killpg(process.pid, signal.SIGKILL)
        elif sweep.interrupts and not forwarded:
            display.say(f"stopping {name}; press Ctrl-C again to kill it")
            os.kill(process.pid, signal.SIGINT)
            forwarded = True
        process.join(0.25)
    if not (sweep.root / name / "metrics.json").exists():
        reason = last_line(log) if process.exitcode >= 0 else f"killed by {signal.Signals(-process.exitcode).name}"
        outcome = ("interrupted", "stopped by Ctrl-C or a signal") if sweep.interrupts else ("failed", reason)
        write_status(sweep.root, name, *outcome)
    return read_run(sweep.root, name, sweep.metric)


def run_alone(root: Path, name: str, program: str) -> None:
    """One run, from its beginning, in a process of its own, with its output in output.log."""
    os.setsid()  # Ctrl-C in the terminal reaches the sweep only, which forwards it
    threading.Thread(target=die_with_parent, daemon=True).start()
    run = root / name
    with lock(root, f"{name}.run"):  # the run of a sweep that was killed may take a moment to die
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        sys.stdout = sys.stderr = open(run / "output.log", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        for number in (1, 2):  # what C code and other processes print
            os.dup2(sys.stdout.fileno(), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        run_program(program, root / "configs" / f"{name}.yaml", run)


def run_program(program: str, config: Path, run: Path) -> None:
    """Executes a run in this process; writes config.yaml and metrics.json into its folder if the program does not."""
    function, settings = import_program(program), yaml.load(config.read_bytes(), yaml.CSafeLoader)
    option = "run_dir" if "run_dir" in settings else "trainer.default_root_dir"
    args = ["fit", f"--config={config}", f"--{option}={run}"]
    sys.argv = [str(sys.modules[function.__module__].__file__), *args]  # Lightning starts further processes with it
    os.environ |= {"WANDB_RUN_GROUP": run.parent.name, "WANDB_NAME": run.name, "WANDB_PROGRAM": sys.argv[0]}
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    start = time.monotonic()
    cli = function(args)
    if not hasattr(cli, "trainer"):
        fail(f"program {program} must return its LightningCLI; it returned {cli!r}")
    if not (run / "config.yaml").exists():
        shutil.copy(config, run / "config.yaml")
    if not (run / "metrics.json").exists():
        metrics = {key: value.item() for key, value in cli.trainer.callback_metrics.items()}
        write_metrics(run, cli.trainer, metrics, time.monotonic() - start)
    if "wandb" in sys.modules:  # a forked process skips the exit handlers, with which W&B closes a run
        sys.modules["wandb"].finish()


def die_with_parent() -> None:
    """Kills this process and those that it started as soon as its parent has died."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os.killpg(0, signal.SIGKILL)


def last_line(log: Path) -> str:
    """The last line of a log, or the last error in it; "" if there is no log yet."""
    text = ""
    with contextlib.suppress(FileNotFoundError):
        text = log.read_bytes()[-10_000:].decode(errors="replace")
    lines = re.findall(r"\S[^\r\n]*", text)
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return ["", *lines, *errors][-1]
