"""Sweeps a grid over a LightningCLI program: one config file for each combination, one run after another.

    python sweep.py                                  # the grid of configs/sweep.yaml
    python sweep.py --config my_grid.yaml --dry_run  # write and check the configs only
    python sweep.py --run_dir some/configs           # run the config files of a folder
    python sweep.py --launcher slurm                 # as jobs of SLURM, by slurm.py

All state lies in logs/sweeps/NAME, so the same command goes on where the last one was stopped, and a second one shares
the work. A run is finished when its metrics.json is there and its config.yaml is the one asked for. The program is a
function main(args) that returns its LightningCLI; if it has an option --run_dir, a run's folder is given by it. If its
module has a function preload(), that is called once, before the processes of the runs are forked.
"""

import contextlib
import csv
import dataclasses
import datetime
import difflib
import functools
import gc
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import yaml
from filelock import FileLock, Timeout
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

# No rich up here: in a process that imports it before torch, 1 would be parsed as 1.0, since typing gives the first
# Union[float, int] that it has seen for each later Union[int, float]. The runs' processes import this file.

START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT: Any = multiprocessing.get_context(START)
PLACES = {("run_dir",), ("ckpt_path",), ("trainer", "default_root_dir")}  # what a program may save as it was run
LOADER, DUMPER = getattr(yaml, "CSafeLoader", yaml.SafeLoader), getattr(yaml, "CSafeDumper", yaml.SafeDumper)
Flat = dict[tuple[str, ...], Any]  # a config: path of keys -> value
Point = tuple[int, ...]  # of a grid: the index of each axis's value


class Mistake(Exception):
    """What the user has to change, in one line."""


# 1. From a grid to config files -------------------------------------------------------------------------------------


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last words of each key, as many as tell it apart from the others."""
    words = {key: [w for w in key.split(".") if w not in ("init_args", "class_path")] or [key] for key in keys}

    def name(own: list[str], count: int) -> str:
        unique = sum(other[-count:] == own[-count:] for other in words.values()) == 1
        return ".".join(own[-count:]) if unique or count >= len(own) else name(own, count + 1)

    return {key: name(own, 1) for key, own in words.items()}


def files(overlay: Any) -> Any:
    """The config files of an overlay: one, a list of them, or none."""
    return [overlay] if isinstance(overlay, str) else overlay or []


def labels(key: str, values: Iterable[Any]) -> list[str]:
    """Short names of an axis's values, each safe in a file name, and independent of the values that follow it."""
    names: list[str] = []
    for value in values:
        text = value.get("class_path", value) if isinstance(value, dict) else value
        if key == "config" and value:
            text = "+".join(Path(file).stem for file in files(value))
        elif isinstance(text, str) and re.fullmatch(r"([A-Za-z_]\w*\.)+[A-Za-z_]\w*", text):  # a class
            text = text.rpartition(".")[2]
        if not isinstance(text, int | float):
            text = (text if isinstance(text, str) else json.dumps(text)).strip("-[]{}")
        name = re.sub(r"[^\w.+-]+", "-", text if isinstance(text, str) else json.dumps(text), flags=re.ASCII)[:30]
        alike = name in names or isinstance(value, dict) or not name.strip("-")
        names.append(f"{name}~{digest(value)}" if alike else name)
    return names


def digest(value: Any) -> str:
    """Six characters that differ where values differ."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:6]


def run_names(root: Path, grid: dict[str, list[Any]], points: list[Point]) -> list[str]:
    """A name for each point: its number and its values; a run that is there already keeps its number."""
    parts = (file.stem.partition("-") for file in (root / "configs").glob("[0-9]*-*.yaml"))
    there = {name: number for number, _, name in parts}
    numbers = itertools.count(1 + max(map(int, there.values()), default=-1))
    width = max(3, len(str(len(points) - 1)))
    axes = [
        [re.sub(r"[^\w.+=~-]+", "-", f"{short}={name}") for name in labels(key, grid[key])]
        for key, short in short_names(grid).items()
    ]
    names = ["-".join(axis[index] for axis, index in zip(axes, point)) for point in points]
    names = [name if len(name) < 150 else f"{name[:140]}~{digest(name)}" for name in names]
    return [f"{there.get(name) or format(next(numbers), f'0{width}')}-{name}" for name in names]


def to_arguments(key: str, value: Any) -> list[str]:
    """A setting as it is typed on the program's command line."""
    if key == "config":
        return [f"--config={file}" for file in files(value)]
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}"]


def flatten(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of a nested config."""
    if not isinstance(config, dict) or not config:
        yield path, config
        return
    for key, value in config.items():
        yield from flatten(value, (*path, key))


def exact(config: Any) -> dict[tuple[str, ...], str]:
    """The leaves of a config for a comparison in which 1, 1.0 and true are different, as they are for Lightning."""
    return {path: repr(value) for path, value in flatten(config)}


def to_yaml(flat: Flat, values: dict[str, Any]) -> str:
    """A config file, which says in its first line what was swept."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        functools.reduce(lambda inner, key: inner.setdefault(key, {}), path[:-1], nested)[path[-1]] = value
    return f"# swept: {json.dumps(values)}\n" + yaml.dump(nested, Dumper=DUMPER, sort_keys=False, width=1000)


@functools.cache
def swept_values(path: Path) -> dict[str, Any]:
    """What a config file says in its first line; nothing if it has no such line."""
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        if (line := file.readline()).startswith("# swept: "):
            return json.loads(line.removeprefix("# swept: "))
    return {}


def swept_labels(root: Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What was swept in each run, by key, as it is shown."""
    swept = {name: swept_values((root / "configs" / f"{name}.yaml").absolute()) for name in names}
    shown: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(key for values in swept.values() for key in values):
        different = {json.dumps(values[key]): values[key] for values in swept.values() if key in values}
        shown[key] = dict(zip(different, labels(key, different.values())))
    return {name: {key: shown[key][json.dumps(value)] for key, value in swept[name].items()} for name in swept}


def load(path: Path) -> Any:
    """The content of a YAML or JSON file; None if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, LOADER)
    return None


def write(path: Path, text: str) -> None:
    """Writes a file: all of it, or nothing.

    Raises:
        OSError: If it can't be written; names it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk has no name
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def import_program(program: str) -> Any:
    """The function of module:function.

    Raises:
        Mistake: If there is none.
    """
    module, _, function = program.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:
        raise Mistake(f"program {program} can't be imported: {type(error).__name__}: {error}") from error


def script(program: str) -> str:
    """The file of a program, for a command line."""
    return program.partition(":")[0].replace(".", "/") + ".py"


class Grid:
    """All combinations of a grid, as the program's own parser understands them.

    A value is parsed beside the first values of the other axes. Axes that set the same keys (a class and its arguments,
    say) are parsed in all their combinations; others are combined without parsing again, which takes a hundredth.

    Args:
        program: As in sweep.
        before: Arguments in front of an overlay.
        after: Arguments behind it.
        axes: As in sweep's grid.

    Raises:
        Mistake: If the program refuses a combination, or makes or returns no LightningCLI.
    """

    def __init__(self, program: str, before: list[str], after: list[str], axes: dict[str, list[Any]]) -> None:
        from lightning.pytorch.cli import LightningCLI

        self.before, self.after, self.axes = before, after, axes
        self.parser: Any = None
        function, made, first = import_program(program), [], (0,) * len(axes)
        parse = LightningCLI.parse_arguments

        def keep(cli: LightningCLI, parser: Any, args: Any) -> None:
            made.append(cli)
            self.parser = parser
            parse(cli, parser, args)

        run = mock.patch.multiple(  # up to where it would make a model or anything else
            LightningCLI,
            parse_arguments=keep,
            _set_seed=lambda _: None,
            instantiate_classes=lambda _: None,
            _run_subcommand=lambda *_: None,
        )
        with run, self._in_one_line(first):
            try:
                returned = function(self._arguments(first))
            except AttributeError:  # what follows in the function may need what hasn't been made
                if not made:
                    raise
                returned = made[0]
        if not made or returned is not made[0]:
            raise Mistake(f"program {program} returns no LightningCLI, but {returned!r}")
        self.reference = self._parse(first)
        sizes = [len(values) for values in axes.values()]
        tangles: list[tuple[set[int], set]] = []  # axes that set the same keys, and those keys
        for axis, size in enumerate(sizes):
            keys = {path for index in range(size) for path in self._difference((axis,), (index,))}
            met = [t for t in tangles if any(p[: len(q)] == q[: len(p)] for p in keys for q in t[1])]
            tangles = [t for t in tangles if t not in met]
            tangles.append(({axis}.union(*(t[0] for t in met)), keys.union(*(t[1] for t in met))))
        self.groups = [tuple(sorted(tangle)) for tangle, _ in tangles]
        dice = random.Random(0)
        for point in (tuple(size - 1 for size in sizes), *(tuple(map(dice.randrange, sizes)) for _ in range(3))):
            if exact(self.config(point)) != exact(self._parse(point)):  # they act on each other in another way
                self.groups = [tuple(range(len(axes)))]

    def config(self, point: Point) -> Flat:
        """The complete config of a point: the index of each axis's value."""
        flat = dict(self.reference)
        for group in self.groups:
            flat |= self._difference(group, tuple(point[axis] for axis in group))
        return {path: value for path, value in flat.items() if value is not ...}

    def values(self, point: Point) -> dict[str, Any]:
        """The swept values of a point."""
        return {key: values[index] for (key, values), index in zip(self.axes.items(), point)}

    @functools.cache  # noqa: B019  there is one grid in a process
    def _difference(self, group: tuple[int, ...], indices: tuple[int, ...]) -> Flat:
        """What some axes change in the reference; ...: the key is not there."""
        if not any(indices):
            return {}
        flat = self._parse(tuple(dict(zip(group, indices)).get(axis, 0) for axis in range(len(self.axes))))
        changed = {path: value for path, value in flat.items() if repr(self.reference.get(path, ...)) != repr(value)}
        return dict.fromkeys(self.reference.keys() - flat.keys(), ...) | changed

    def _arguments(self, point: Point) -> list[str]:
        values = self.values(point)
        overlay = to_arguments("config", values.pop("config", None))
        return [*self.before, *overlay, *self.after, *(a for item in values.items() for a in to_arguments(*item))]

    def _parse(self, point: Point) -> Flat:
        with self._in_one_line(point):
            config = self.parser.parse_args(self._arguments(point))
            text = self.parser.dump(config, "json", skip_unset=False, skip_validation=True)
        flat = dict(flatten(json.loads(text)["fit"]))
        return flat | ({("seed_everything",): 0} if flat.get(("seed_everything",)) is True else {})  # as Lightning does

    @contextlib.contextmanager
    def _in_one_line(self, point: Point) -> Iterator[None]:
        """Turns the program's refusal into a Mistake; what it prints is not shown."""
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                yield
        except (SystemExit, Exception) as error:
            told = f"{type(error).__name__}: {error}"
            if isinstance(error, SystemExit):
                told = output.getvalue().strip() or str(error)
            told = re.sub(r".*?^error: ", "", told, count=1, flags=re.DOTALL | re.MULTILINE)  # a usage comes first
            if (unknown := re.search(r"unrecognized arguments: --([\w.]+)", told)) and self.parser:
                parsers = getattr(self.parser._subcommands_action, "choices", {"fit": self.parser})
                told = f"{unknown[0]}{nearest(unknown[1], (action.dest for action in parsers['fit']._actions))}"
            values = ", ".join(f"{key}={json.dumps(value)}" for key, value in self.values(point).items())
            base = "" if self.before[1:] or "config" in self.axes else ", without a base"
            raise Mistake(f"{told} (with {values}{base})") from error


def write_configs(answer: Connection, checked: tuple, points: list[Point], root: Path, settings: dict) -> None:
    """Checks the config of each point and then writes those that are not there, in a process of its own.

    Args:
        answer: Is sent the names of the runs, whether the program has an option --run_dir, and the files that were
            damaged, or a Mistake's text.
        checked: Grid's arguments.
        points: The runs.
        root: The sweep's folder.
        settings: Content of sweep.yaml; empty if the configs are those of a folder, whose files' names the runs take.
    """
    die_with_sweep()
    try:
        grid = Grid(*checked)

        def look() -> tuple[list[str], list[tuple[Path, Flat, dict]], list[str]]:
            damaged = check_grid(root, settings)
            if settings:
                names = run_names(root, grid.axes, points)
            else:
                names = [Path(grid.values(point)["config"]).stem for point in points]
            seen: dict[int, str] = {}
            missing = []
            for name, point in zip(names, points):
                config, path = grid.config(point), root / "configs" / f"{name}.yaml"
                if settings and (same := seen.setdefault(hash(str(config)), name)) != name:
                    raise Mistake(f"{same} and {name} are the same run")
                source = None if settings else Path(grid.values(point)["config"])
                values = swept_values(source) if source else grid.values(point)
                if not is_written(path, config, values):
                    if source and path.exists() and path.samefile(source):
                        raise Mistake(f"{path} is damaged: python sweep.py --config={root / 'sweep.yaml'} mends it")
                    missing.append((path, config, values))
            return names, missing, damaged + [str(path) for path, *_ in missing if path.exists()]

        look()  # nothing is written, and no folder made, before all is checked
        with lock(root, "sweep"):
            names, missing, damaged = look()  # another sweep may have written meanwhile
            if settings:
                write(root / "sweep.yaml", yaml.dump(settings, Dumper=DUMPER, sort_keys=False))
            for path, config, values in missing:
                write(path, to_yaml(config, values))
        answer.send((names, ("run_dir",) in grid.reference, damaged))
    except Exception as error:
        answer.send(str(error) if isinstance(error, Mistake | OSError) else f"{type(error).__name__}: {error}")


def check_grid(root: Path, settings: dict[str, Any]) -> list[str]:
    """Sees to it that a sweep's folder is of the same program and grid, or of a smaller one.

    Returns:
        Its sweep.yaml, if that is damaged.

    Raises:
        Mistake: If it isn't.
    """
    path = root / "sweep.yaml"
    saved = load_sweep(path)
    if not settings or not path.exists():
        return []
    if not saved or is_cut_off(path, yaml.dump(settings, Dumper=DUMPER, sort_keys=False)):
        return [str(path)]
    before, now = (
        {"the program": [one["program"]], "the axes": [*one["grid"]], **one["grid"]} for one in (saved, settings)
    )
    for key, old in before.items():
        new = now[key]
        if any(repr(value) not in map(repr, new) for value in old) or (key == "the axes" and old != new):
            raise Mistake(
                f"{root} has {key}: {old}, now it is {new}: give the sweep another name, or delete its folder"
            )
    return []


def load_sweep(path: Path) -> dict[str, Any]:
    """The content of a sweep.yaml; nothing if it isn't all there."""
    saved = load(path)
    return saved if isinstance(saved, dict) and isinstance(saved.get("program"), str) else {}  # which comes last


def is_cut_off(path: Path, text: str) -> bool:
    """Whether a file holds the beginning of a text, but not all of it."""
    there = path.read_text(encoding="utf-8", errors="replace")
    return there != text and text.startswith(there)


def is_written(path: Path, flat: Flat, values: dict[str, Any]) -> bool:
    """Whether a run's config is there already, and whole.

    Raises:
        Mistake: If it is, with other settings.
    """
    there, asked = exact(load(path)), {key: repr(value) for key, value in flat.items()}
    if () in there or not path.read_bytes().endswith(b"\n"):  # no file, no settings in it, or cut off
        return False
    for key in {**there, **asked}:
        old, new = (config.get(key, "nothing") for config in (there, asked))
        if old != new:
            if is_cut_off(path, to_yaml(flat, values)):
                return False
            change = f"{path} has {'.'.join(key)}: {old}, now it is {new}"
            raise Mistake(f"{change}: give the sweep another name, or delete its folder")
    return True


# 2. From a config file to a run -------------------------------------------------------------------------------------


def lock(root: Path, name: str, timeout: float = -1) -> Any:
    """A lock that goes with the process that holds it."""
    (root / ".locks").mkdir(parents=True, exist_ok=True)
    return FileLock(root / ".locks" / f"{name}.lock").acquire(timeout=timeout)


def status(root: Path, name: str, metric: str) -> tuple[str, dict[str, Any]]:
    """How a run stands.

    Returns:
        finished (with its metrics); failed or interrupted (with reason and time); damaged (with reason); running;
        pending.
    """
    run = root / name
    metrics, ended = load(run / "metrics.json"), load(run / "status.json")
    ended = ended if isinstance(ended, dict) and {"status", "reason", "time"} <= ended.keys() else {}
    reason = ""
    if (run / "metrics.json").exists():
        configs = (root / "configs" / f"{name}.yaml", run / "config.yaml")
        asked, done = (
            {path: value for path, value in exact(load(file)).items() if path not in PLACES} for file in configs
        )
        unreadable = [file for file, content in zip(configs, (asked, done)) if () in content]
        unreadable += [] if isinstance(metrics, dict) else [run / "metrics.json"]
        reason = f"{unreadable[0]} can't be read" if unreadable else f"{configs[1]} is another one than {configs[0]}"
        if asked == done and not unreadable:
            numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
            if not math.isfinite(numbers.get(metric, 0)):
                return "failed", {"time": 0, **ended, "reason": f"diverged: {metric} is {numbers[metric]}"}
            return "finished", numbers
    if ended:
        return ended["status"], ended
    if reason:
        return "damaged", {"reason": reason}
    return "running" if run.exists() else "pending", {}


def fingerprint(file: Path) -> list[int]:
    """The size of a file, and a checksum of its beginning and its end, where it would be cut off."""
    with open(file, "rb") as content:
        size, checksum = file.stat().st_size, zlib.crc32(content.read(2**16))
        content.seek(max(0, size - 2**16))
        return [size, zlib.crc32(content.read(), checksum)]


def damaged_file(run: Path) -> Path | None:
    """A checkpoint or event file of a finished run that isn't what it was; one that was deleted is no damage."""
    noted = load(run / "files.json")
    for name, before in noted.items() if isinstance(noted, dict) else ():
        with contextlib.suppress(OSError):
            if fingerprint(run / name) != before:
                return run / name
    return None


def train(root: Path, name: str, program: str, takes_run_dir: bool) -> None:
    """Runs a config, in a process of its own, whose output goes to output.log in the run's folder."""
    claim = lock(root, f"{name}.run")  # until this process ends; that of a killed sweep may take a moment to die
    run, config = root / name, root / "configs" / f"{name}.yaml"
    if run.exists():
        if any(file.name != "status.json" for file in run.iterdir()) and not (run / "output.log").exists():
            sys.exit(f"error: {run} is no run's folder")
        shutil.rmtree(old := root / ".locks" / f"{name}.old", ignore_errors=True)  # from a process that was killed here
        run.rename(old)  # at once, and not file by file
        shutil.rmtree(old)
    run.mkdir()
    log = os.open(run / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C is for the sweep, which passes it on
    die_with_sweep()
    os.environ |= {"WANDB_RUN_GROUP": root.name, "WANDB_NAME": name, "WANDB_PROGRAM": script(program)}  # W&B reads them
    text = config.read_text(encoding="utf-8")
    if "WandbLogger" in text:
        threading.Thread(target=start_wandb_service, daemon=True).start()
    function = import_program(program)
    args = ["fit", f"--config={config}", f"--{'run_dir' if takes_run_dir else 'trainer.default_root_dir'}={run}"]
    sys.argv = [str(sys.modules[function.__module__].__file__), *args]  # with it, Lightning starts further processes
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    start = time.monotonic()
    cli = function(args)
    if not hasattr(cli, "trainer"):
        sys.exit(f"error: program {program} returns no LightningCLI, but {cli!r}")
    trainer = cli.trainer
    if not (run / "config.yaml").exists():
        write(run / "config.yaml", text)
    if not (run / "metrics.json").exists():
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
        metrics |= {"epochs": trainer.current_epoch, "seconds": time.monotonic() - start}
        metrics["best_checkpoint"] = os.path.relpath(best, run) if best else None
        write(run / "metrics.json", json.dumps(metrics, indent=2))
    written = (file for file in run.rglob("*") if file.suffix == ".ckpt" or ".tfevents." in file.name)
    fingerprints = {str(file.relative_to(run)): fingerprint(file) for file in written if file.is_file()}
    write(run / "files.json", json.dumps(fingerprints, indent=2))
    claim.lock.release()


def die_with_sweep() -> None:
    """Sees to it that this process ends as soon as the sweep's is no more."""

    def watch(sweep: Any) -> None:
        sweep.join()
        kill(os.getpid())

    if parent := multiprocessing.parent_process():
        threading.Thread(target=watch, args=(parent,), daemon=True).start()


def kill(pid: int) -> None:
    """Kills a run's process at once, and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg") and os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)


def start_wandb_service() -> None:
    """Starts W&B's own process, for which the run would wait 0.2 s, beside other things."""
    with contextlib.suppress(Exception):  # the run will meet it again, and tell
        importlib.import_module("wandb").setup()


def last_line(log: Path, wanted: str = "") -> str:
    """The last line of a log; of those that begin with what is wanted, if there are any."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 10_000))
        lines = [line for line in re.split(r"[\r\n]+", file.read().decode(errors="replace")) if line.strip()]
        return next((line for line in reversed(lines) if line.startswith(wanted)), lines[-1] if lines else "").strip()
    return ""


def preload() -> None:
    """In the server from which the runs are forked: imports what they need; what fails is told where it is needed."""
    with contextlib.suppress(Exception, SystemExit):
        module = importlib.import_module(os.environ.pop("SWEEP_PRELOAD"))
        getattr(module, "preload", lambda: None)()
    gc.freeze()  # garbage collection in the runs need not look at it,
    gc.set_threshold(20_000)  # and after so many new objects is soon enough; 700, and it takes 2% of a short run


def start_server(program: str) -> None:
    """Starts that server, with this file's preload."""
    sys.path[:0] = [folder for folder in (os.getcwd(), str(Path(__file__).parent)) if folder not in sys.path]
    if START != "forkserver":
        return
    preloads = {"SWEEP_PRELOAD": program.partition(":")[0], "PYTHONPATH": os.pathsep.join(sys.path)}
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server's, and at first the runs'
    with mock.patch.dict(os.environ, preloads):
        multiprocessing.set_forkserver_preload([Path(__file__).stem])
        multiprocessing.forkserver.ensure_running()
    signal.signal(signal.SIGINT, on_interrupt)


def start_process(program: str, **how: Any) -> Any:
    """Starts a process from the server, and the server anew if it was killed.

    Raises:
        Mistake: If it is killed each time.
    """
    for _ in range(3):
        start_server(program)
        process = CONTEXT.Process(**how)
        with contextlib.suppress(EOFError, ConnectionError):
            process.start()
            return process
    raise Mistake("no process can be started: is there too little memory?")


# 3. The sweep -------------------------------------------------------------------------------------------------------


class Sweep:
    """The runs of a sweep, and what is shown of them.

    Args:
        root: The sweep's folder.
        metric: As in sweep, like the others.
        mode: Likewise.
        retry_failed: Likewise.
    """

    def __init__(self, root: Path, metric: str, mode: str, retry_failed: bool) -> None:
        from rich.console import Console

        self.root, self.metric, self.mode, self.retry_failed = root, metric, mode, retry_failed
        self.names: list[str] = []  # the runs that are asked for
        self.finished: dict[str, dict[str, float]] = {}  # with their metrics
        self.failed: dict[str, str] = {}  # those that won't be tried again, with the reason
        self.stops = 0  # how often it was asked to stop
        self.gives_up = False  # since too many runs failed in a row
        self.live: Any = None
        self.console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)

    def look(self, name: str) -> tuple[str, dict[str, Any]]:
        """A run's status; that of a finished one is read once."""
        if name in self.finished:
            return "finished", self.finished[name]
        stands, details = status(self.root, name, self.metric)
        if stands == "finished" and (file := damaged_file(self.root / name)):
            return "damaged", {"reason": f"{file} isn't what the run wrote"}
        if stands == "finished":
            self.finished[name] = details
        return stands, details

    def is_open(self, name: str) -> bool:
        """Whether there is something to do: a run that failed is tried again, but once in a sweep."""
        stands, details = self.look(name)
        if stands == "failed" and (details["time"] > self.start or not self.retry_failed):
            self.failed[name] = details["reason"]
        return stands != "finished" and name not in self.failed

    def best(self) -> list[str]:
        """Those of the runs that are finished, the best first, those without the metric last."""
        sign = -1 if self.mode == "max" else 1
        done = [name for name in self.names if name in self.finished]
        return sorted(done, key=lambda name: (sign * self.finished[name].get(self.metric, sign * math.inf), name))

    def claims(self) -> Iterator[str]:
        """The runs that there are to do, each under its lock; waits for those that other sweeps do."""
        while todo := [name for name in self.names if self.is_open(name)]:
            claimed = 0
            for name in todo:
                try:
                    with lock(self.root, name, timeout=0):
                        if self.is_open(name):
                            yield name
                except Timeout:
                    claimed += 1
                if self.stops or self.gives_up:
                    return
            if claimed == len(todo):
                self.show(f"{claimed} still run in another sweep")
                time.sleep(1)

    def go(self, max_failures: int, launch: "Callable[[Sweep, dict], Iterator[str]]", **how: Any) -> int:
        """Does what there is to do.

        Args:
            max_failures: As in sweep.
            launch: Does runs, and gives each one's name when it has ended.
            how: Arguments of train.

        Returns:
            The exit status: 0 only if all runs are finished.

        Raises:
            Mistake: If the metric is none of the runs', or too many failed in a row.
        """
        from rich.live import Live

        self.start = time.time()
        for interrupt in (signal.SIGINT, signal.SIGTERM):
            signal.signal(interrupt, self.stop)
        with contextlib.ExitStack() as stack:
            if self.console.is_terminal:
                self.live = stack.enter_context(Live(console=self.console, transient=True))
            self.record()
            self.before, in_a_row = len(self.best()), 0
            for name in launch(self, how):
                self.record()
                in_a_row = in_a_row + 1 if name in self.failed else 0
                self.gives_up = in_a_row == max_failures
        self.record()
        self.print_table(self.best())
        for name, reason in self.failed.items():
            self.say(f"failed: {name}: {reason} (see {self.root / name / 'output.log'})")
        done, took = f"{len(self.best())} of {len(self.names)} runs are finished", duration(time.time() - self.start)
        self.say(f"{done}, after {took}: {self.root / 'results.csv'}")
        if self.stops < 2:
            self.say(make_report(self.root, self.metric, self.mode))
        if self.stops:
            self.say("stopped: the same command goes on from here")
        if self.gives_up:
            raise Mistake(f"stopped, since {in_a_row} runs failed in a row: is it the same fault?")
        return 130 if self.stops else 1 if self.failed else 0

    def in_turn(self, how: dict[str, Any]) -> Iterator[str]:
        """Does one run after another, each in a process of its own; gives the name of each that has ended."""
        for name in self.claims():
            self.run(name, how)
            yield name

    def run(self, name: str, how: dict[str, Any]) -> None:
        """Runs one, waits for its end, and notes how it failed."""
        log, told = self.root / name / "output.log", False
        stands, details = self.look(name)
        if stands == "damaged":
            self.say(f"{details['reason']}, so {name} starts over")
        process = start_process(how["program"], target=train, kwargs={"root": self.root, "name": name, **how})
        while not wait([process.sentinel], timeout=0.25) or self.outlives(name):
            self.show(f"{number(name)}  {last_line(log) or 'begins'}")
            with contextlib.suppress(ProcessLookupError):
                if self.stops > 1:
                    kill(process.pid)
                elif self.stops and not told and (START == "spawn" or os.getpgid(process.pid) == process.pid):
                    self.say(f"stopping {name}, which the same command will start over; Ctrl-C once more: at once")
                    os.kill(process.pid, signal.SIGINT)  # by now it can handle it
                    told = True
        process.join()
        stands, details = self.look(name)
        if stands == "finished":
            return self.say(self.progress(name))
        reason = details.get("reason") or last_line(log, "error: ").removeprefix("error: ")
        if process.exitcode < 0:
            reason = f"killed by {signal.Signals(-process.exitcode).name}" + " (out of memory?)"
        elif process.exitcode == 0 and stands != "failed":
            reason = "it left no metrics.json, or another config.yaml than it was given"
        if self.stops:
            reason = "stopped by Ctrl-C or a signal"
        self.note(name, "interrupted" if self.stops else "failed", reason, time.time())

    def note(self, name: str, outcome: str, reason: str, when: float) -> None:
        """Notes and tells how a run ended that isn't finished."""
        write(self.root / name / "status.json", json.dumps({"status": outcome, "reason": reason, "time": when}))
        if outcome == "failed" and when > self.start:
            self.failed[name] = reason
        self.say(f"{name} {outcome}: {reason} (see {self.root / name / 'output.log'})")

    def outlives(self, name: str) -> bool:
        """Whether a run's process lives on, though nothing is heard of it: the server that forked it was killed."""
        try:
            lock(self.root, f"{name}.run", timeout=0.25).lock.release()
        except Timeout:
            return True
        return False

    def stop(self, *_: Any) -> None:
        """What Ctrl-C does: first the current run ends cleanly, then at once."""
        self.stops += 1

    def record(self) -> None:
        """Writes results.csv: a row for each run of the folder.

        Raises:
            Mistake: If the finished runs don't have the metric.
        """
        rows, table = [], io.StringIO()
        with lock(self.root, "sweep"):
            for path in sorted((self.root / "configs").glob("*.yaml")):
                stands, details = self.look(path.stem)
                metrics = details if stands == "finished" else {}
                rows.append({"name": path.stem, "status": stands, **swept_values(path.absolute()), **metrics})
            last = {"epochs", "seconds"}  # behind whatever metrics there are
            columns = dict.fromkeys([*(key for row in rows for key in row if key not in last), *sorted(last)])
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([to_cell(row.get(key)) for key in columns] for row in rows)
            write(self.root / "results.csv", table.getvalue())
        for name in self.best()[:1]:
            if self.metric not in (known := self.finished[name]):
                near = nearest(self.metric, known) or f"; there are {', '.join(known)}"
                raise Mistake(f"{name} reports no metric {self.metric}{near}")

    def progress(self, name: str = "") -> str:
        """How far the sweep is; after a run, with its metric first."""
        best, total = self.best(), len(self.names)
        done = len(best) + len(self.failed)
        parts = [f"[{done:{len(str(total))}}/{total}]"]
        if name:
            metrics = self.finished[name]
            value = metrics.get(self.metric, math.nan)
            padded = name.ljust(max(map(len, self.names)))
            parts.append(f"{padded}  {self.metric} {value:.4f}  {metrics.get('seconds', 0):.0f} s")
        if best and not (name and self.live):  # the display has the rest
            parts.append(f"best {self.finished[best[0]].get(self.metric, math.nan):.4f} ({number(best[0])})")
            if self.before < len(best) and done < total:
                left = (time.time() - self.start) / (len(best) - self.before) * (total - done)
                parts.append(f"{duration(left)} left")
        return "  ".join([*parts, f"{len(self.failed)} failed"] if self.failed else parts)

    def show(self, now: str) -> None:
        """Draws the live display, where there is a terminal."""
        if not self.live:
            return
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        display = Table.grid()
        display.add_row(ProgressBar(len(self.names), len(self.best()) + len(self.failed)))
        for line in (self.progress(), now):
            display.add_row(Text(line, no_wrap=True, overflow="ellipsis"))
        self.live.update(display)

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        try:
            if self.live:
                self.console.print(line, soft_wrap=True, markup=False)
            else:
                print(line, flush=True)
        except OSError:  # whoever reads it has gone; what is left in the buffer would change the exit status
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def print_table(self, names: list[str], rows: int = 20) -> None:
        """Prints runs as W&B's run table does: what was swept, how it ended; as many columns as there is room for."""
        swept = swept_labels(self.root, names)
        axes = short_names(dict.fromkeys(key for values in swept.values() for key in values))
        swept = {name: swept[name] for name in names[:rows]}
        ended = {name: self.finished.get(name, {}) for name in swept}
        metrics = dict.fromkeys(itertools.chain(*ended.values()))
        table = [["run", *axes.values(), *metrics]]
        for name, values in swept.items():
            cells = [values.get(key, "") for key in axes]
            digits = {"epochs": 0, "seconds": 0}
            numbers = [f"{ended[name][key]:.{digits.get(key, 4)}f}" if key in ended[name] else "" for key in metrics]
            table.append([number(name), *cells, *numbers])
        widths = [max(map(len, column)) for column in zip(*table)]
        fit = sum(end <= self.console.width + 2 for end in itertools.accumulate(width + 2 for width in widths))
        for row in table if names else ():
            self.say("  ".join(cell.ljust(width) for cell, width in zip(row[:fit], widths)).rstrip())
        if len(names) > rows:
            self.say(f"and {len(names) - rows} more")


def number(name: str) -> str:
    """The number of a grid's run; the whole name of any other."""
    return name.partition("-")[0] if re.match(r"\d+-.*=", name) else name


def make_report(root: Path, metric: str, mode: str) -> str:
    """Has report.py write its page, if that can be done; returns what to tell."""
    try:
        return f"report: {importlib.import_module('report').report(root, metric, mode)}"
    except ImportError as error:
        return f"no report.html, since {error.name} is missing" + ": pip install '.[report]'" * (error.name != "report")
    except Exception as error:  # the runs are none the worse
        return f"no report.html: {type(error).__name__}: {error}"


def to_cell(value: Any) -> Any:
    """A value as a CSV file has it."""
    return value if isinstance(value, str | float) else "" if value is None else json.dumps(value)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(datetime.timedelta(seconds=round(seconds)))


def nearest(name: str, known: Iterable[str]) -> str:
    """The nearest right name, in brackets; nothing if there is none."""
    return "".join(f" (did you mean {match}?)" for match in difflib.get_close_matches(name, known, n=1))


@dataclasses.dataclass(frozen=True)
class Slurm:
    """What --launcher=slurm asks of SLURM.

    Args:
        partition: Where the runs go; null: the cluster's default.
        time: Minutes that a run may take.
        gpus: For each run.
        cpus: For each run, one for each of its threads.
        runs_at_once: No more than so many at a time; null: as many as SLURM lets.
        options: Further options of sbatch, such as account, qos or mem.
        poll: Seconds between two questions how the jobs stand.
    """

    partition: str | None = None
    time: PositiveInt = 60
    gpus: NonNegativeInt = 0
    cpus: PositiveInt = 1
    runs_at_once: PositiveInt | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    poll: PositiveFloat = 10.0


def launch_by(launcher: str, asked: Slurm) -> Callable[[Sweep, dict], Iterator[str]]:
    """How runs are done: one after another here, or by SLURM.

    Raises:
        Mistake: If it can't be done here.
    """
    if launcher == "local":
        return Sweep.in_turn
    try:
        return importlib.import_module("slurm").Jobs(asked).follow
    except ImportError as error:
        hint = ": pip install '.[cluster]'" if error.name == "submitit" else ", which is not there"
        raise Mistake(f"launcher slurm needs {error.name}{hint}") from error


def sweep(
    base: list[str] | str = [],  # noqa: B006  read only, like the next two
    grid: dict[str, Any] = {},  # noqa: B006
    fixed: dict[str, Any] = {},  # noqa: B006
    name: str | None = None,
    metric: str = "val/acc",
    mode: Literal["max", "min"] = "max",
    program: str = "main:main",
    dry_run: bool = False,
    limit: PositiveInt | None = None,
    retry_failed: bool = True,
    max_failures: PositiveInt = 3,
    run_dir: str | None = None,
    launcher: Literal["local", "slurm"] = "local",
    slurm: Slurm = Slurm(),
) -> int:
    """Writes the configs of a grid into logs/sweeps/NAME/configs and runs them; the same command again goes on.

    Args:
        base: Config files of the program with which every run begins.
        grid: Key, as on the program's command line -> list of values. The key `config` takes overlays: files, lists
            of files, or null for none.
        fixed: Key -> value, the same in every run.
        name: The sweep's folder in logs/sweeps, and the runs' group in W&B; "sweep" or run_dir's name if null.
        metric: What runs are compared by, as metrics.json has it.
        mode: Whether more or less of it is better.
        program: module:function, where function(args) returns its LightningCLI.
        dry_run: Write and check the configs, print the table of runs, train nothing.
        limit: Only so many runs, the first of the grid.
        retry_failed: Whether runs that failed in an earlier sweep are tried again.
        max_failures: Stop when so many runs fail in a row.
        run_dir: Instead of base and grid: a folder of config files, each of which is run.
        launcher: Where runs are done: here, one after another, or as jobs of SLURM.
        slurm: What the launcher slurm asks for each run.

    Returns:
        The exit status: 0 if all runs are finished.

    Raises:
        Mistake: If something has to be changed first.
    """
    launch = launch_by(launcher, slurm)
    base = files(base)
    for path, value in itertools.chain(flatten(fixed), flatten(grid)):
        try:
            ".".join(path), json.dumps(value)
        except TypeError:
            told = f"grid and fixed take text as keys, and values as JSON has them, not {[*path, value]}"
            raise Mistake(told) from None
    fixed, grid = ({".".join(path): value for path, value in flatten(some) if path} for some in (fixed, grid))
    root = Path("logs/sweeps", name or Path(run_dir or "sweep").resolve().name)
    if name is not None and not (re.fullmatch(r"\w[\w.+=@ -]*", name) and len(os.fsencode(name)) < 256):
        raise Mistake(f"name: {name!r} can't be the name of a folder")
    if run_dir:
        if base or grid:
            raise Mistake("run_dir takes the place of base and grid")
        grid = {"config": [str(path) for path in sorted(Path(run_dir).glob("*.y*ml"))]}
        if not grid["config"]:
            raise Mistake(f"{run_dir} has no config files (*.yaml)")
        stems = [Path(file).stem for file in grid["config"]]
        for stem in stems:
            if stems.count(stem) > 1 or stem in ("configs", "results.csv"):
                raise Mistake(f"{run_dir} has a config file {stem}, which can't be the name of its run")
        if not name and Path(run_dir).name == "configs" and Path(run_dir, "../.locks").exists():
            root = Path(run_dir).parent  # these are the configs of a sweep
    if not grid:
        raise Mistake("the grid is empty: give --config, --grid or --run_dir")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise Mistake(f"grid: {key} must be a list of one value or more, got {json.dumps(values)}")
        given = [json.dumps(value) for value in values]
        for value in given:
            if given.count(value) > 1:
                raise Mistake(f"grid: {key} has {value} twice")
        for value in values if key == "config" else ():
            if not isinstance(value, str | list | None) or not all(isinstance(file, str) for file in files(value)):
                raise Mistake(f"grid: a value of config is a file, a list of files, or null, not {json.dumps(value)}")
        if key in fixed:
            raise Mistake(f"{key} is both in grid and in fixed")
    settings = {"base": base, "grid": grid, "fixed": fixed, "name": name, "metric": metric, "mode": mode}
    settings["program"] = program
    product = itertools.product(*(range(len(values)) for values in grid.values()))
    points = list(itertools.islice(product, limit and min(limit, sys.maxsize)))
    before = ["fit", *to_arguments("config", base)]
    after = [argument for item in fixed.items() for argument in to_arguments(*item)]
    runs = Sweep(root, metric, mode, retry_failed)
    with runs.console.status(f"importing {program} and checking {len(points)} configs"):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        work = (sender, (program, before, after, grid), points, root, {} if run_dir else settings)
        checker = start_process(program, target=write_configs, args=work, daemon=True)
        sender.close()
        try:
            answer = receiver.recv()
        except EOFError:
            raise Mistake(f"program {program} ended while the configs were checked") from None
        checker.join()
    if isinstance(answer, str):
        raise Mistake(answer)
    names, takes_run_dir, damaged = answer
    for file in damaged:
        runs.say(f"{file} was damaged, and is written anew")
    runs.names = sorted(names)
    if dry_run:
        runs.print_table(runs.names, rows=100)
        runs.say(f"{len(points)} runs: {root / 'configs'}")
        return 0
    return runs.go(max_failures, launch, program=program, takes_run_dir=takes_run_dir)


def explain(message: str, args: list[str], known: Iterable[str]) -> str:
    """What jsonargparse tells in a paragraph, in a line: the setting, the types that it takes, and the value."""
    message = " ".join(message.split())
    if unknown := re.search(r"(?:(?:Group '(\w+)' does not accept o|O)ption '|arguments: --)([\w.]+)", message):
        name = ".".join(filter(None, unknown.groups()))
        return f"unknown setting {name}{nearest(name, known)}"
    key = re.match(r'Parser key "([\w.]+)": ', message)
    types = re.findall(r"(?:Expected (?:an? )?|Not of type )(?:<class '|typing\.)?(\w+(?:\[.*?\])?)", message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if key and types and value:
        return f"{key[1]}: expected {' or '.join(dict.fromkeys(types))}, got {value[1]}".replace("NoneType", "null", 1)
    if key:
        return f"{key[1]}: {message[key.end() :]}"
    return f"{message} ({' '.join(args)})" if args else message


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    while (hole := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(hole, True)  # or else the next file to be opened would be a closed standard stream
    os.close(hole)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    args = sys.argv[1:] if args is None else args
    flags = {"--dry_run", "--retry_failed"}
    following = [*args[1:], ""]
    args = [f"{a}=true" if a in flags and b not in ("true", "false") else a for a, b in zip(args, following)]
    default = Path(__file__).parent / "configs/sweep.yaml"
    if default.exists() and not any(arg.startswith(("--config", "--run_dir", "--grid")) for arg in args):
        args = [f"--config={default}", *args]
    about = (sweep.__doc__ or "").partition("\n")[0]
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=about)
    parser.add_argument(
        "--config", action="config", help="A YAML file with these settings; without it and a grid: configs/sweep.yaml."
    )
    parser.add_function_arguments(sweep)
    try:
        first_keys = [match[0] for arg in args if (match := re.match(r"--(fixed|grid)\.[^.=]+\.", arg))]
        if len(set(first_keys)) < len(first_keys):  # jsonargparse would keep the last one only
            raise Mistake(
                "--fixed.KEY and --grid.KEY can be given once for each KEY: give --fixed='{KEY.A: 1, KEY.B: 2}'"
            )
        try:
            given = parser.parse_args(args)
        except (TypeError, ValueError, AttributeError) as error:  # where jsonargparse doesn't expect such a value
            raise Mistake(f"these settings can't be read: {error}") from error
        settings = given.as_dict()
        del settings["config"]
        if not isinstance(settings["slurm"], dict):
            raise Mistake(f"slurm: expected its settings, got {settings['slurm']}")
        for key, default in parser.get_defaults().items():
            if default is not None and given[key] is None:  # which jsonargparse takes for anything
                raise Mistake(f"{key}: null is no value")
        return sweep(**settings | {"slurm": Slurm(**settings["slurm"])})
    except (Mistake, OSError) as error:
        message = str(error)
    except ArgumentError as error:
        message = explain(str(error), args, (action.dest for action in parser._actions))
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the exit status stays what it is
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 1


if "SWEEP_PRELOAD" in os.environ:
    preload()
if __name__ == "__main__":
    module = importlib.import_module(Path(__file__).stem)
    del sys.modules["__main__"].__file__  # or else each run would compile and execute this file anew
    sys.exit(module.main())
