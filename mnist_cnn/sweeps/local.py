"""Executes runs on this machine, one after another, each in a process of its own."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from mnist_cnn.run.errors import fail
from mnist_cnn.run.folder import write_metrics
from mnist_cnn.sweeps.display import Display
from mnist_cnn.sweeps.grid import import_program
from mnist_cnn.sweeps.ledger import Run, lock, read_run, run_number, write_status


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
        return run.status != "finished" and (run.status != "failed" or (self.root / name).stat().st_mtime < self.start)


def run_all(sweep: Sweep, display: Display) -> Iterator[Run]:
    """Executes the runs that are not finished, and yields each; waits for those that other processes execute."""
    if any("WandbLogger" in config.read_text(encoding="utf-8") for config in (sweep.root / "configs").glob("*.yaml")):
        import wandb.sdk.launch  # noqa: F401  W&B would import it in each run, which takes a second
    while unfinished := [name for name in sweep.names if sweep.is_open(name)]:
        for name in unfinished:
            if sweep.interrupts or sweep.gave_up:
                return
            display.show(f"{run_number(name)}  waiting for the process that executes it")
            with contextlib.suppress(Timeout), lock(sweep.root, name, timeout=0.25):
                if sweep.is_open(name):  # another process may have finished it meanwhile
                    yield execute(sweep, name, display)


def execute(sweep: Sweep, name: str, display: Display) -> Run:
    """Executes one run, whose lock this process holds, and notes why it did not finish."""
    run, stopped = sweep.root / name, False
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(exist_ok=True)
    (log := run / "output.log").touch()
    # A forked process has all that is imported, and the caches that checking the configs filled: it starts in a second.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    process = context.Process(target=run_alone, args=(run.absolute(), sweep.program))
    process.start()
    while process.is_alive():
        display.show(f"{run_number(name)}  {last_line(log)}")
        if sweep.interrupts > 1:
            with contextlib.suppress(ProcessLookupError):  # it has no group yet
                os.killpg(process.pid, signal.SIGKILL)
        elif sweep.interrupts and not stopped and os.getpgid(process.pid) == process.pid:  # it has its own handlers
            display.say(f"stopping {name}; Ctrl-C kills it")
            os.kill(process.pid, signal.SIGINT)
            stopped = True
        process.join(0.25)
    if not (run / "metrics.json").exists():
        reason = last_line(log) if process.exitcode >= 0 else f"killed by {signal.Signals(-process.exitcode).name}"
        reason = reason if process.exitcode else f"program {sweep.program} exits, but must return its LightningCLI"
        outcome = ("interrupted", "stopped by Ctrl-C or a signal") if sweep.interrupts else ("failed", reason)
        write_status(sweep.root, name, *outcome)
    return read_run(sweep.root, name, sweep.metric)


class Recorder(Callback):
    """Keeps the metrics of each step of fit, and of evaluations after it; Lightning keeps the last value of each."""

    def __init__(self) -> None:
        self.records: dict[int, dict[str, float]] = {}  # step of the weights -> metrics
        self.seen: dict[str, Any] = {}

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        fitting, logged = trainer.state.fn == "fit", dict(trainer.callback_metrics)
        # What is not logged anew stays the same object.
        new = {name: value.item() for name, value in logged.items() if value is not self.seen.get(name)}
        step = trainer.global_step if fitting else step_of(trainer.ckpt_path, trainer)
        old, self.seen = self.records.get(step, {}), logged
        self.records[step] = old | new if fitting else new | old  # of two with one name, that of fit counts

    on_train_epoch_start = on_train_end = on_test_end = on_save_checkpoint = on_validation_end  # type: ignore

    def result(self, trainer: Any) -> tuple[dict[str, float], str | None]:
        """The metrics of the best checkpoint by a monitored metric, and its path; else of the last step, and None."""
        callbacks = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor)
        best = next((c.best_model_path for c in callbacks if os.path.isfile(c.best_model_path)), None)
        return self.records.get(step_of(best, trainer), {}), best


def step_of(checkpoint: str | None, trainer: Any) -> int:
    """The step of a checkpoint; None: of the weights at the end of fit."""
    return torch.load(checkpoint, "cpu", weights_only=False)["global_step"] if checkpoint else trainer.global_step


def run_alone(run: Path, program: str) -> None:
    """Executes a run in this process; writes config.yaml and metrics.json into its folder if the program does not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()  # Ctrl-C in the terminal reaches the sweep only, which forwards it
    threading.Thread(target=die_with_parent, daemon=True).start()
    sys.stdout = sys.stderr = open(run / "output.log", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    for number in (1, 2):  # what C code and other processes print
        os.dup2(sys.stdout.fileno(), number)
    function, config = import_program(program), run.parent / "configs" / f"{run.name}.yaml"
    options, start = [f"--run_dir={run}"], time.monotonic()
    if "\nrun_dir: " not in config.read_text(encoding="utf-8"):
        options = [f"--trainer.default_root_dir={run}", f"--trainer.callbacks+={Recorder.__module__}.Recorder"]
    sys.argv = [str(sys.modules[program.partition(":")[0]].__file__), "fit", f"--config={config}", *options]  # for DDP
    os.environ |= {"WANDB_RUN_GROUP": run.parent.name, "WANDB_NAME": run.name, "WANDB_PROGRAM": sys.argv[0]}
    cli = function(sys.argv[1:])
    if not hasattr(cli, "trainer"):
        fail(f"program {program} must return its LightningCLI; it returned {cli!r}")
    if not (run / "config.yaml").exists():
        shutil.copy(config, run / "config.yaml")
    if not (run / "metrics.json").exists():
        recorders = [callback for callback in cli.trainer.callbacks if isinstance(callback, Recorder)]
        logged = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
        metrics, best = recorders[0].result(cli.trainer) if recorders else (logged, None)
        write_metrics(run, cli.trainer, metrics, time.monotonic() - start, best)
    if "wandb" in sys.modules:  # a forked process skips the exit handlers, with which W&B closes a run
        sys.modules["wandb"].finish()


def die_with_parent() -> None:
    """Kills this process and those that it started as soon as its parent has died."""
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os.killpg(0, signal.SIGKILL)


def last_line(log: Path) -> str:
    """The last line of a log, or the last error in it; "" if it is empty."""
    lines = re.findall(r"\S[^\r\n]*", log.read_bytes()[-10_000:].decode(errors="replace"))
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return ["", *lines, *errors][-1]
