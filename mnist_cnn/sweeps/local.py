"""Executes runs on this machine, one after another or several at a time, each in a process of its own."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import Timeout
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from mnist_cnn.run.errors import fail
from mnist_cnn.run.folder import write_metrics
from mnist_cnn.sweeps.display import Display
from mnist_cnn.sweeps.grid import import_program
from mnist_cnn.sweeps.ledger import Run, lock, read_run, run_number, write_status
from mnist_cnn.sweeps.search import TRIAL, Pruned, Reporter, Search


@dataclass
class Sweep:
    """The runs to execute, and whether to go on."""

    root: Path
    names: list[str]
    program: str
    metric: str
    jobs: int = 1
    search: Search | None = None
    start: float = field(default_factory=time.time)
    interrupts: int = 0  # how often Ctrl-C was pressed
    gave_up: bool = False  # too many runs failed in a row

    def interrupt(self, *_: Any) -> None:
        """Handles SIGINT and SIGTERM."""
        self.interrupts += 1

    def is_open(self, run: Run) -> bool:
        """Whether a run is to be executed: one that failed is tried again, but only once by the same command."""
        if run.status != "failed":
            return run.status not in ("finished", "pruned")
        with contextlib.suppress(FileNotFoundError):  # another process executes it again
            return (self.root / run.name).stat().st_mtime < self.start
        return True

    def open_runs(self) -> list[str]:
        """The runs that are to be executed, or that other processes execute.

        Those that failed come last, before them those that share values with them: a few bad values stop no others.
        """
        if self.search:
            return self.search.open_runs()
        runs = [read_run(self.root, name, self.metric) for name in self.names]
        failed = Counter(repr(item) for run in runs if run.status == "failed" for item in run.swept.items())

        def order(run: Run) -> tuple[bool, int]:
            return run.status == "failed", sum(failed[repr(item)] for item in run.swept.items())

        return [run.name for run in sorted(filter(self.is_open, runs), key=order)]

    def claim(self, name: str) -> Any:
        """Acquires the lock of a run; None if another process executes it, or has finished it meanwhile."""
        with contextlib.suppress(Timeout):
            held = lock(self.root, name, timeout=0)
            if self.is_open(read_run(self.root, name, self.metric)):
                return held
            held.lock.release()
        return None


class Job:
    """A run that is executed in a process of its own; its lock is held until it has ended."""

    def __init__(self, sweep: Sweep, name: str, held: Any, gpu: str | None) -> None:
        self.sweep, self.name, self.held, self.gpu, self.stopped = sweep, name, held, gpu, False
        run = sweep.root / name
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(exist_ok=True)
        (run / "output.log").touch()
        # A forked process has all that is imported and the caches of checking the configs: it starts in a second.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        prunes = bool(sweep.search and sweep.search.settings["pruner"])
        self.process = context.Process(target=run_alone, args=(run.absolute(), sweep.program, gpu, prunes))
        self.process.start()

    def last_line(self) -> str:
        """The last line of the log, or the last error in it; "" if it is empty."""
        text = (self.sweep.root / self.name / "output.log").read_bytes()[-10_000:].decode(errors="replace")
        lines = re.findall(r"\S[^\r\n]*", text)
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return ["", *lines, *errors][-1]

    def forward_interrupts(self, display: Display) -> None:
        """Stops the process after the first Ctrl-C, kills it after the second."""
        with contextlib.suppress(ProcessLookupError):  # it has no group yet, or has just ended
            if self.sweep.interrupts > 1:
                os.killpg(self.process.pid, signal.SIGKILL)
            elif self.sweep.interrupts and not self.stopped and os.getpgid(self.process.pid) == self.process.pid:
                display.say(f"stopping {self.name}; Ctrl-C kills it")  # it has its own handlers now
                os.kill(self.process.pid, signal.SIGINT)
                self.stopped = True

    def end(self) -> Run:
        """Notes why the run did not finish, if it did not, and releases its lock."""
        root, program, code = self.sweep.root, self.sweep.program, self.process.exitcode
        if not any((root / self.name / file).exists() for file in ("metrics.json", "status.json")):
            reason = self.last_line() if code >= 0 else f"killed by {signal.Signals(-code).name}"
            reason = reason if code else f"program {program} exits, but must return its LightningCLI"
            interrupted = ("interrupted", "stopped by Ctrl-C or a signal")
            write_status(root, self.name, *(interrupted if self.sweep.interrupts else ("failed", reason)))
        run = read_run(root, self.name, self.sweep.metric)
        self.held.lock.release()  # another process may execute the run again
        return run


def run_all(sweep: Sweep, display: Display) -> Iterator[Run]:
    """Executes the runs that are not finished, and yields each; waits for those that other processes execute."""
    if any("WandbLogger" in config.read_text(encoding="utf-8") for config in (sweep.root / "configs").glob("*.yaml")):
        import omegaconf  # noqa: F401  each run would import both of them, which takes a second
        import wandb.sdk.launch

        wandb.setup(wandb.Settings(silent=True))  # starts the process that writes runs, once for all of them
    if sweep.open_runs() and (hint := idle(sweep)):
        display.say(hint)
    gpus = visible_gpus() if sweep.jobs > 1 else []
    free = [gpus[index % len(gpus)] if gpus else None for index in range(sweep.jobs)]  # the GPU of each job
    jobs: list[Job] = []
    while True:
        stopping = sweep.interrupts or sweep.gave_up
        names = sweep.open_runs() if free and not stopping else []
        for name in names:
            if free and (held := sweep.claim(name)):
                jobs.append(Job(sweep, name, held, free.pop(0)))
        if not jobs and not names:
            if "wandb" in sys.modules:
                sys.modules["wandb"].teardown()
            return
        lines = [f"{run_number(job.name)}  {job.last_line()}" for job in jobs]
        display.show(*lines or ["waiting for runs that other processes execute"])
        for job in jobs:
            job.forward_interrupts(display)
        wait([job.process.sentinel for job in jobs], 0.25) if jobs else time.sleep(0.25)
        for job in [job for job in jobs if not job.process.is_alive()]:
            jobs.remove(job)
            free.append(job.gpu)
            run = job.end()
            print(display.erase(), end="")
            yield run


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    return given.split(",") if given else []


def idle(sweep: Sweep) -> str:
    """Says how many jobs would use cores or GPUs that stand idle; "" if none do."""
    config = yaml.load((sweep.root / "configs" / f"{sweep.names[0]}.yaml").read_text("utf-8"), yaml.CSafeLoader)
    on_cpu = config.get("trainer", {}).get("accelerator") == "cpu"
    gpus, threads = [] if on_cpu else visible_gpus(), config.get("num_threads") or 0  # 0: unknown, of another program
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    kind, total, each = ("GPU", len(gpus), 1) if gpus else ("core", cores, threads)
    possible = total // each if each else 0
    used = f"{total} {kind}s, {each * sweep.jobs} in use: --jobs={possible} would use {'both' if total == 2 else 'all'}"
    return used if possible > sweep.jobs else ""


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


def run_alone(run: Path, program: str, gpu: str | None, prunes: bool) -> None:
    """Executes a run in this process; Optuna may prune it."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
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
    if prunes:
        os.environ[TRIAL] = str(run)
        options.append(f"--trainer.callbacks+={Reporter.__module__}.Reporter")
    sys.argv = [str(sys.modules[program.partition(":")[0]].__file__), "fit", f"--config={config}", *options]  # for DDP
    os.environ |= {"WANDB_RUN_GROUP": run.parent.name, "WANDB_NAME": run.name, "WANDB_PROGRAM": sys.argv[0]}
    try:
        cli = function(sys.argv[1:])
    except Pruned as pruned:
        write_status(run.parent, run.name, "pruned", str(pruned))
    else:
        if not hasattr(cli, "trainer"):
            fail(f"program {program} must return its LightningCLI; it returned {cli!r}")
        if not (run / "metrics.json").exists():
            recorders = [callback for callback in cli.trainer.callbacks if isinstance(callback, Recorder)]
            logged = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
            metrics, best = recorders[0].result(cli.trainer) if recorders else (logged, None)
            write_metrics(run, cli.trainer, metrics, time.monotonic() - start, best)
    if not (run / "config.yaml").exists():
        shutil.copy(config, run / "config.yaml")
    if "wandb" in sys.modules:  # a forked process skips the exit handlers, with which W&B closes a run
        sys.modules["wandb"].finish()


def die_with_parent() -> None:
    """Kills this process and those that it started as soon as its parent has died."""
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os.killpg(0, signal.SIGKILL)
