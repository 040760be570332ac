"""Executes runs as SLURM jobs, by submitit. Ctrl-C only stops the waiting; the same command submits the rest again."""

import contextlib
import importlib.util
import io
import os
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from mnist_cnn.run.errors import UserError
from mnist_cnn.sweeps import local
from mnist_cnn.sweeps.display import Display
from mnist_cnn.sweeps.ledger import Run, read_run, write_status
from mnist_cnn.sweeps.local import Sweep


@dataclass(frozen=True)
class Slurm:
    """What --launcher=slurm requests for each run.

    Args:
        partition: Partition; null: the cluster's default.
        time: Minutes that a run may take.
        gpus: GPUs of a run.
        cpus: CPUs of a run.
        runs_at_once: Run at most so many at a time; null: as many as SLURM allows.
        options: Further options of sbatch, such as account, qos or mem.
        poll: Seconds between two queries of the jobs' states.
    """

    partition: str | None = None
    time: PositiveInt = 60
    gpus: NonNegativeInt = 0
    cpus: PositiveInt = 1
    runs_at_once: PositiveInt | None = None
    options: dict[str, Any] = field(default_factory=dict)
    poll: PositiveFloat = 10.0


def check(jobs: int, search: str | None) -> None:
    """Refuses what SLURM cannot do."""
    if not (importlib.util.find_spec("submitit") and shutil.which("sbatch")):
        raise UserError("launcher slurm needs SLURM's commands on PATH, and submitit: pip install '.[cluster]'")
    if jobs > 1:
        raise UserError("jobs are those of this machine; launcher slurm has slurm.runs_at_once")
    if search:
        raise UserError("a search runs on this machine: launcher slurm cannot execute it")


def run_job(sweep: Sweep, name: str) -> None:
    """What a job does: executes the run, unless it is finished."""
    sweep = replace(sweep, names=[name])
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # with it, submitit would end the run before its time is up
    signal.signal(signal.SIGTERM, sweep.interrupt)  # SLURM is about to end or requeue the job
    os.environ.pop("SLURM_NTASKS", None)  # with it, Lightning would take the run for one task of several
    for _ in local.run_all(sweep, Display(sweep.metric, "max")):
        pass
    if sweep.interrupts:
        os._exit(1)  # without a result for submitit, so that the job's state counts: it may be requeued


def submit(sweep: Sweep, names: list[str], slurm: Slurm) -> dict[str, Any]:
    """Submits runs as one job array; returns their jobs by name."""
    import submitit

    executor = submitit.SlurmExecutor(sweep.root / ".locks/slurm")
    executor.update_parameters(
        job_name=sweep.root.name,
        partition=slurm.partition,
        time=slurm.time,
        gpus_per_node=slurm.gpus or None,
        cpus_per_task=slurm.cpus,
        array_parallelism=slurm.runs_at_once or len(names),
        setup=[f"export PYTHONPATH={shlex.quote(os.pathsep.join(sys.path))}"],
        additional_parameters=slurm.options,
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the error has sbatch's message, too
            return dict(zip(names, executor.map_array(run_job, [sweep] * len(names), names)))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"SLURM refuses the jobs: {error}") from error


def run_all(sweep: Sweep, display: Display, slurm: Slurm) -> Iterator[Run]:
    """Submits the runs that are not finished, waits for their jobs, and yields each run whose job has ended."""
    if not (unfinished := sweep.open_runs()):
        return
    jobs = submit(sweep, unfinished, slurm)
    array = jobs[unfinished[0]].job_id.partition("_")[0]
    display.say(f"submitted {len(jobs)} runs to SLURM: squeue --jobs={array}")
    while jobs and not sweep.gave_up:
        states, next_poll = Counter(job.state.lower() for job in jobs.values()), time.monotonic() + slurm.poll
        display.show(", ".join(f"{count} {state}" for state, count in states.items()))
        while time.monotonic() < next_poll:
            time.sleep(0.25)
            if sweep.interrupts:
                display.say(f"the jobs continue; to cancel them: scancel {array}")
                return
        for name, job in list(jobs.items()):
            if job.done() and (run := read_run(sweep.root, name, sweep.metric)).status != "running":
                del jobs[name]
                if sweep.is_open(run):
                    reason = f"SLURM job {job.job_id} ended: {job.state.lower()} ({job.paths.stderr})"
                    write_status(sweep.root, name, "failed", reason)
                yield read_run(sweep.root, name, sweep.metric)
    for job in jobs.values():  # too many runs failed
        job.cancel()
