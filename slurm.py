"""The runs of a sweep as jobs of SLURM: `python sweep.py --launcher=slurm`.

Each run is a task of a job array, in which sweep.py's train does what it does here. What submitit keeps of a job lies
in .locks/slurm in the sweep's folder until it has ended: its files tell the same command, started again, which jobs
there are. A job without its file does nothing, so none goes unseen, whenever the process ends that submits them.
"""

import contextlib
import functools
import io
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import submitit
from filelock import Timeout

from sweep import Mistake, Slurm, Sweep, damaged_file, last_line, lock, status, train

# How a job ends. What SLURM took from a run through no fault of its own is submitted again.
LOST = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL")
ENDED = (*LOST, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "REVOKED")


def run(root: Path, metric: str, how: dict[str, Any], name: str) -> None:
    """What a job does: a run, unless it is finished by now, or another process is at it."""
    with lock(root, name, timeout=100):
        if status(root, name, metric)[0] == "finished" and not damaged_file(root / name):
            return
        # Lightning would take the run for one task of a larger whole, and resume it from what it saved when it was
        # requeued. It is to go as on any other machine.
        os.environ.pop("SLURM_NTASKS", None)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # or else submitit ends the run before its time, in its own words
        warnings.filterwarnings("ignore", "The `srun` command is available")
        train(root, name, **how)


class Anything:
    """Takes the place of what a pickled file names."""

    def __new__(cls, *_: Any, **__: Any) -> "Anything":
        """Takes any arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Keeps the attributes."""
        vars(self).update(state if isinstance(state, dict) else {})


class Unpickler(pickle.Unpickler):
    """Reads what a file says and calls nothing that it names, since a sweep's folder may be somebody else's."""

    def find_class(self, module: str, name: str) -> Any:
        """Nothing is imported."""
        return Anything


@functools.cache
def run_of(file: Path) -> str:
    """The run that a job does, by the file that submitit keeps for it; "" if that is damaged."""
    with contextlib.suppress(Exception), open(file, "rb") as content:
        return Unpickler(content).load().args[0]
    return ""


class Jobs:
    """The jobs of a sweep.

    Args:
        asked: What each job asks for.

    Raises:
        Mistake: If this machine has no SLURM.
    """

    def __init__(self, asked: Slurm) -> None:
        self.asked = asked
        for command in ("sbatch", "squeue", "scancel", "scontrol"):
            if not shutil.which(command):
                raise Mistake(f"launcher slurm needs SLURM's {command}, which is not on PATH")

    def follow(self, runs: Sweep, how: dict[str, Any]) -> Iterator[str]:
        """Submits the runs that there are to do and have no job yet, and waits for all.

        Ctrl-C ends the waiting only. If the sweep gives up, the jobs are cancelled.

        Args:
            runs: The sweep.
            how: Arguments of train.

        Yields:
            Each run that has ended, finished or failed.

        Raises:
            Mistake: If SLURM refuses a job.
        """
        self.root, self.runs, self.how, self.folder = runs.root, runs, how, runs.root / ".locks/slurm"
        todo, first = [name for name in runs.names if runs.is_open(name)], True
        while todo:
            with lock(self.root, "slurm"):  # another follower may have seen the same
                states = self.states()
                if states is not None:
                    self.settle(states, late=first)
                    self.submit()
                jobs = self.jobs()
            mine = {jobs[name] for name in todo if name in jobs}
            if first and mine:
                runs.say(f"{len(mine)} runs are with SLURM: squeue --jobs={self.ids(mine)}")
            first = first and states is None
            for name in [name for name in todo if name not in jobs and not runs.is_open(name)]:
                todo.remove(name)
                if name in runs.finished:
                    runs.say(runs.progress(name))
                yield name
                if runs.gives_up:
                    return self.cancel()
            stand = [states.get(job, "PENDING").lower() for job in mine] if states is not None else []
            shown = ", ".join(f"{stand.count(state)} {state}" for state in sorted(set(stand)))
            end = time.monotonic() + self.asked.poll * bool(todo)
            while time.monotonic() < end and not runs.stops:
                runs.show(shown or "waiting for SLURM's answer, or for another sweep")
                time.sleep(0.1)
            if runs.stops:
                if mine:
                    runs.say(f"the jobs go on: scancel {self.ids(mine).replace(',', ' ')} ends them")
                return

    def states(self) -> dict[str, str] | None:
        """How the jobs stand that SLURM still knows of; None if it doesn't answer."""
        ids = self.ids(self.jobs().values())
        if not ids:
            return {}
        command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={ids}", "--format=%i %T"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and "Invalid job id" not in done.stderr:
            return None
        return dict(line.split() for line in done.stdout.splitlines())

    def jobs(self) -> dict[str, str]:
        """The number of each run's job, of those that have one."""
        files = self.folder.glob("*_submitted.pkl")
        return {name: file.name.removesuffix("_submitted.pkl") for file in files if (name := run_of(file))}

    def settle(self, states: dict[str, str], late: bool) -> None:
        """Notes which runs failed of those whose jobs have ended.

        Args:
            states: How each job stands.
            late: Whether they ended before this process began to follow them: then they may be tried again.
        """
        jobs = self.jobs()
        for name in [name for name in self.runs.names if name in jobs]:
            state = states.get(jobs[name], "")
            if state and state not in ENDED:
                continue
            job, log = jobs.pop(name), self.root / name / "output.log"
            os.listdir(self.root)  # a network's file system may show an old state of a file, but not of a folder
            stands, details = self.runs.look(name)
            if stands != "finished" and state not in LOST and self.is_free(name):
                printed = self.printed(job)
                reason = self.reason(job, state, printed) or details.get("reason") or last_line(log, "error: ")
                log.parent.mkdir(exist_ok=True)
                with open(log, "a", encoding="utf-8") as file:
                    file.write(printed)
                when = 0 if late else time.time()
                self.runs.note(name, "failed", reason.removeprefix("error: ") or "it left no metrics.json", when)
            self.forget(job)
        if not jobs:
            shutil.rmtree(self.folder, ignore_errors=True)

    def forget(self, job: str) -> None:
        """Removes what is kept of a job."""
        for file in self.folder.glob(f"{job}_*"):
            file.unlink()

    def printed(self, job: str) -> str:
        """What a job printed before its run began, or SLURM of it."""
        logs = [self.folder / f"{job}_0_log.{end}" for end in ("out", "err")]
        lines = [line for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines()]
        return "".join(f"{line}\n" for line in lines if not line.startswith("submitit "))

    def reason(self, job: str, state: str, printed: str) -> str:
        """Why a job failed, unless the run's own log tells."""
        if state not in ("COMPLETED", "FAILED", ""):
            return f"job {job} is {state.lower().replace('_', ' ')}"
        if killed := re.search(r"srun: error: .*: task 0: (?!Exited)(.+)", printed):
            return killed[1]
        own = [line for line in printed.splitlines() if not re.match(r"srun:|slurmstepd:", line)]
        return own[-1] if own else ""

    def is_free(self, name: str) -> bool:
        """Whether no process is at a run, here or in a job."""
        try:
            with lock(self.root, name, timeout=0):
                return True
        except Timeout:
            return False

    def submit(self) -> None:
        """Submits the runs that there are to do and have no job.

        Raises:
            Mistake: If SLURM refuses.
        """
        asked, jobs = self.asked, self.jobs()
        names = [
            name for name in self.runs.names if name not in jobs and self.runs.is_open(name) and self.is_free(name)
        ]
        names = names[: self.longest_array]
        if not names or (jobs and asked.runs_at_once):  # an array's limit is its own: one array at a time
            return
        executor = submitit.SlurmExecutor(self.folder)
        given = {"partition": asked.partition, "gpus_per_node": asked.gpus or None, **asked.options}
        try:
            executor.update_parameters(
                job_name=self.root.name,
                time=asked.time,
                signal_delay_s=10,  # before the time is up; submitit's 90 may come before Python can ignore the signal
                cpus_per_task=asked.cpus,
                array_parallelism=asked.runs_at_once or len(names),
                setup=[f"export PYTHONPATH={shlex.quote(os.pathsep.join(sys.path))}"],
                additional_parameters={key: value for key, value in given.items() if value is not None},
            )
            work = functools.partial(run, self.root, self.runs.metric, self.how)
            with contextlib.redirect_stderr(io.StringIO()), mock.patch.dict(os.environ):  # the error has it as well
                if "SLURM_JOB_ID" in os.environ:  # a job's own variables would be taken for options
                    for key in [key for key in os.environ if key.startswith("SLURM_") and key != "SLURM_CONF"]:
                        del os.environ[key]
                new = executor.map_array(work, names)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            told = re.sub(r"^sbatch: (error: )?", "", str(error), flags=re.MULTILINE)
            raise Mistake(f"SLURM takes no job: {'; '.join(told.splitlines())}") from error
        self.runs.say(f"submitted {len(new)} runs to SLURM: job {new[0].job_id.partition('_')[0]}")

    @functools.cached_property
    def longest_array(self) -> int:
        """As many runs as SLURM takes in one array."""
        shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True).stdout
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", shown)
        return int(found[1]) if found else 1000

    def cancel(self) -> None:
        """Ends the jobs of the sweep's runs."""
        with lock(self.root, "slurm"):
            if mine := [job for name, job in self.jobs().items() if name in self.runs.names]:
                subprocess.run(["scancel", *mine], check=False)
                for job in mine:
                    self.forget(job)

    def ids(self, jobs: Iterable[str]) -> str:
        """Numbers of jobs, an array's but once."""
        return ",".join(sorted({job.partition("_")[0] for job in jobs}))
