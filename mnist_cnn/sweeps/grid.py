"""From the points of a grid to run names and complete configs."""

import contextlib
import importlib
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import yaml

from mnist_cnn.run.errors import UNSERIALIZABLE, UserError, explain, set_parsing
from mnist_cnn.run.folder import flatten
from mnist_cnn.sweeps.axes import Point
from mnist_cnn.sweeps.ledger import Config, changes


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last word of each key, or the whole key without init_args and class_path if another one ends so."""
    whole = {key: re.sub(r"\.(init_args|class_path)\b", "", key) for key in keys}
    last = {key: name.rpartition(".")[2] for key, name in whole.items()}
    return {key: name if [*last.values()].count(name) == 1 else whole[key] for key, name in last.items()}


def labels(values: Iterable[Any]) -> dict[str, str]:
    """The JSON of each value -> a label: all are different, safe in a file name, and independent of later values."""
    names: dict[str, str] = {}
    for value in values:
        if (code := json.dumps(value)) in names:
            continue
        text = re.sub(r'"class_path": |(\w+\.)+(?=[A-Z])|[^/" ]*/|\.ya?ml\b', "", code)  # no modules and folders
        name = re.sub(r"[^\w.+-]+", "-", text.strip('[{"}]'))[:30]
        names[code] = f"{name}~{zlib.crc32(code.encode()):x}" if name in names.values() else name
    return names


def swept_labels(swept: list[dict[str, Any]]) -> list[dict[str, str]]:
    """For the swept settings of each run: short name of the key -> label of the value."""
    names = short_names(key for settings in swept for key in settings)
    shown = {key: labels(settings[key] for settings in swept if key in settings) for key in names}
    return [{names[key]: shown[key][json.dumps(value)] for key, value in settings.items()} for settings in swept]


def run_names(existing: Iterable[str], swept: list[dict[str, Any]]) -> list[str]:
    """A name for each point's settings, like `000-l1_chan=4-lr=0.1`; existing runs, all in the grid, keep theirs."""
    names = ["-".join(f"{key}={label}" for key, label in settings.items()) for settings in swept_labels(swept)]
    names = [name if len(name) < 150 else f"{name[:140]}~{zlib.crc32(name.encode()):x}" for name in names]
    known = {run.partition("-")[2]: run for run in existing}
    if others := [known[name] for name in known.keys() - names]:
        raise UserError(f"run {min(others)} is not in this grid: give the sweep another name, or delete its folder")
    numbers, width = itertools.count(len(known)), max(3, len(str(len(names) - 1)))
    return [known.get(name) or f"{next(numbers):0{width}}-{name}" for name in names]


def import_program(program: str) -> Callable[[list[str]], Any]:
    """Imports the function that `module:function` names; the module may be in the working directory."""
    module, _, name = program.partition(":")
    if module not in sys.modules:
        sys.path.insert(0, os.getcwd())
    set_parsing(own=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads of OpenMP, if the import started them, would block the runs that are forked
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, SyntaxError, AttributeError, SystemExit) as error:
        raise UserError(f"program {program} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        torch.set_num_threads(threads)


def print_config(program: str, args: list[str]) -> dict[str, Any]:
    """The complete config that the program's `fit --print_config` prints."""
    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            import_program(program)(["fit", *args, "--print_config"])
    except SystemExit as ended:
        if ended.code:
            message = re.split("^error: ", errors.getvalue(), flags=re.MULTILINE)[-1].strip()
            if "arguments: fit" in message:
                raise UserError(f"program {program} has no subcommand fit: omit run=False, or parse args[1:]") from None
            if "module '__main__'" in message:
                raise UserError(f"__main__ is sweep.py here: write {program.split(':')[0]}.CLASS instead") from None
            known = [".".join(key) for key in flatten(print_config(program, []))] if args else []
            raise UserError(explain(message or str(ended.code), known)) from None
    printed = re.split(r"^# lightning.*\n", output.getvalue(), flags=re.MULTILINE)[-1]  # after what the program prints
    if not isinstance(config := yaml.load(printed, yaml.CSafeLoader), dict):
        raise UserError(f"program {program} prints no config: pass its arguments to LightningCLI(args=...)")
    return config


def parse(settings: dict[str, Any], swept: dict[str, Any]) -> Config:
    """The complete config of a point with these swept settings, as the program prints it."""
    both = settings["fixed"] | swept
    overlays = both.pop("config", None) or []
    files = [*settings["base"], *([overlays] if isinstance(overlays, str) else overlays)]  # the last one wins
    options = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in both.items()]
    try:
        config = print_config(settings["program"], [*(f"--config={file}" for file in files), *options])
        if "model" in config and config["model"] is None:
            raise UserError("no config file names a model")
    except UserError as error:
        values = ", ".join(f"{key}={json.dumps(value)}" for key, value in swept.items())
        of_class = any(f"unknown key {key}." in str(error) for key in swept)
        remedy = "; write the class with its arguments as one value, or use exclude" if of_class else ""
        raise UserError(f"{error} (with {values}{'' if files else '; base is not given'}){remedy}") from None
    return {path: value for path, value in flatten(config).items() if not str(value).startswith(UNSERIALIZABLE)}


def complete_configs(parse: Callable[[Point], Config], points: list[Point]) -> list[Config]:
    """The complete config of each point of a grid, from far fewer calls of the program's parser.

    Each value is parsed once, beside the first point's other values, and changes the same keys in all configs. Settings
    that change the same keys are parsed in all combinations. If one of a few samples is wrong, or a combination that is
    no point of the grid cannot be parsed, every point is parsed.
    """
    keys, parsed = list(points[0]), dict[str, Config]()
    if sum(len({json.dumps(point[key]) for point in points}) for key in keys) > len(points):  # drawn from ranges
        return [parse(point) for point in points]

    def parse_once(point: Point) -> Config:
        if (code := json.dumps(point)) not in parsed:
            parsed[code] = parse(point)
        return parsed[code]

    first = parse_once(points[0])

    def changed(point: Point, group: list[str]) -> Config:  # with the first point's other values
        mixed = points[0] | {key: point[key] for key in group}
        try:
            return changes(first, parse_once(mixed))
        except UserError as error:
            if mixed in points:
                raise
            raise KeyError(mixed) from error

    def combine(point: Point, groups: list[list[str]]) -> Config:
        config = first.copy()
        for group in groups:
            config |= changed(point, group)
        return {path: value for path, value in config.items() if value is not ...}

    try:
        paths = {key: {path for point in points for path in changed(point, [key])} for key in keys}
        related = [key for key in keys if any(paths[key] & paths[other] for other in keys if other != key)]
        groups = [related, *([key] for key in keys if key not in related)]
        samples = [*points[:: len(points) // 3 + 1], points[-1]]
        if all(changes(combine(point, groups), parse_once(point)) == {} for point in samples):
            return [combine(point, groups) for point in points]
    except KeyError:  # a combination that is no point
        pass
    return [parse_once(point) for point in points]
