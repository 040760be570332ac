"""From a grid to points, run names and complete configs."""

import functools
import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mnist_cnn.run.config import flatten
from mnist_cnn.run.errors import UserError
from mnist_cnn.sweeps.ledger import Config, Run
from mnist_cnn.sweeps.program import print_config

Point = tuple[int, ...]  # the index of each axis's value


def flat_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by their whole keys: {"model": {"net.l1_chan": 4}} -> {"model.net.l1_chan": 4}."""
    settings = json.loads(json.dumps(settings, default=vars))  # jsonargparse makes Namespaces of some dicts
    return {".".join(path).replace("/", "."): value for path, value in flatten(settings).items() if path}


def check_grid(grid: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Checks what can be checked without the program.

    Raises:
        UserError: If an axis is not a list of different values, or is in `fixed`, too.
    """
    if not grid:
        raise UserError("the grid is empty: give --config, --grid or --config_dir")
    for key, values in grid.items():
        if not isinstance(values, list) or not values or len(set(map(json.dumps, values))) < len(values):
            raise UserError(f"grid: {key} must be a list of different values, got {json.dumps(values)}")
        if key in fixed:
            raise UserError(f"{key} is in grid and in fixed: remove it from one of them")


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last words of each key, as many as distinguish it from the other keys."""
    words = {key: [w for w in key.split(".") if w not in ("init_args", "class_path")] or [key] for key in keys}

    def shorten(own: list[str]) -> str:
        for count in range(1, len(own)):
            if sum(other[-count:] == own[-count:] for other in words.values()) == 1:
                return ".".join(own[-count:])
        return ".".join(own)

    return {key: shorten(own) for key, own in words.items()}


def labels(key: str, values: Iterable[Any]) -> list[str]:
    """Short names of an axis's values, all different and safe in a file name.

    A value's label does not depend on the values behind it, so that an axis can be extended.
    """
    names: list[str] = []
    for value in values:
        text = value.get("class_path", value) if isinstance(value, dict) else value
        if key == "config" and value:
            text = "+".join(Path(file).stem for file in ([value] if isinstance(value, str) else value))
        elif isinstance(text, str) and re.fullmatch(r"([A-Za-z_]\w*\.)+[A-Za-z_]\w*", text):  # a class
            text = text.rpartition(".")[2]
        if not isinstance(text, int | float):
            text = (text if isinstance(text, str) else json.dumps(text)).strip("-[]{}")
        name = re.sub(r"[^\w.+-]+", "-", text if isinstance(text, str) else json.dumps(text), flags=re.ASCII)[:30]
        ambiguous = name in names or isinstance(value, dict) or not name.strip("-")
        names.append(f"{name}~{digest(value)}" if ambiguous else name)
    return names


def digest(value: Any) -> str:
    """Six characters that differ where values differ."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:6]


def run_names(existing: Iterable[str], grid: dict[str, list[Any]], points: list[Point]) -> list[str]:
    """A name for each point, like `000-l1_chan=4-lr=0.1`; an existing run keeps its number."""
    numbers = {name: number for number, _, name in (run.partition("-") for run in existing)}
    next_number = itertools.count(1 + max((int(number) for number in numbers.values() if number.isdigit()), default=-1))
    width = max(3, len(str(len(points) - 1)))
    axes = [
        [re.sub(r"[^\w.+=~-]+", "-", f"{short}={label}") for label in labels(key, grid[key])]
        for key, short in short_names(grid).items()
    ]
    names = ["-".join(axis[index] for axis, index in zip(axes, point)) for point in points]
    names = [name if len(name) < 150 else f"{name[:140]}~{digest(name)}" for name in names]
    return [f"{numbers.get(name) or format(next(next_number), f'0{width}')}-{name}" for name in names]


def swept_labels(runs: list[Run]) -> dict[str, dict[str, str]]:
    """Run name -> key -> label of the swept value."""
    shown: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.swept):
        different = {json.dumps(run.swept[key]): run.swept[key] for run in runs if key in run.swept}
        shown[key] = dict(zip(different, labels(key, different.values())))
    return {run.name: {key: shown[key][json.dumps(value)] for key, value in run.swept.items()} for run in runs}


def to_arguments(key: str, value: Any) -> list[str]:
    """A setting as command-line arguments; the value of `config` is a file, a list of files or null."""
    if key == "config":
        return [f"--config={file}" for file in ([value] if isinstance(value, str) else value or [])]
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}"]


def parse(settings: dict[str, Any], point: Point) -> Config:
    """The complete config of a point, as the program prints it.

    Raises:
        UserError: If the program refuses the point's values.
    """
    swept = {key: values[index] for (key, values), index in zip(settings["grid"].items(), point)}
    both = settings["fixed"] | swept
    files = [("config", settings["base"]), ("config", both.pop("config", None))]  # what comes later wins
    try:
        args = [arg for item in [*files, *both.items()] for arg in to_arguments(*item)]
        config = print_config(settings["program"], args)
        if "model" in config and config["model"] is None:
            raise UserError("no config file names a model")
    except UserError as error:
        values = ", ".join(f"{key}={json.dumps(value)}" for key, value in swept.items())
        no_base = "" if any(file for _, file in files) else "; base is not given"
        raise UserError(f"{error} (with {values}{no_base})") from None
    return flatten(config)


def complete_configs(parse: Callable[[Point], Config], sizes: list[int], points: list[Point]) -> list[Config]:
    """The complete config of each point, from far fewer calls of the program's parser.

    Each value is parsed once, beside the first values of the other axes. Axes that change the same keys (a class and
    its arguments, for example) are parsed in all their combinations. What they change in the first point's config
    gives all other configs. A few of these are parsed, too; if one differs, every point is parsed.

    Args:
        parse: Gives the complete config of a point.
        sizes: The number of values of each axis.
        points: The points.
    """
    parse = functools.cache(parse)
    reference = parse((0,) * len(sizes))

    @functools.cache
    def changes(point: Point) -> Config:  # path -> value; ... if the key is gone
        parsed = parse(point)
        pairs = {path: (reference.get(path, ...), parsed.get(path, ...)) for path in (*reference, *parsed)}
        return {path: new for path, (old, new) in pairs.items() if repr(old) != repr(new)}  # 1, 1.0 and True differ

    def combine(point: Point, groups: list[set[int]]) -> Config:
        config = dict(reference)
        for group in groups:
            config |= changes(tuple(index * (axis in group) for axis, index in enumerate(point)))
        return {path: value for path, value in config.items() if value is not ...}

    def overlap(group: set[int], axis: int) -> bool:
        return any(a[: len(b)] == b[: len(a)] for other in group for a in changed[other] for b in changed[axis])

    axes = range(len(sizes))
    alone = [[tuple(index * (axis == other) for other in axes) for index in range(sizes[axis])] for axis in axes]
    changed = [{path for point in points_of_axis for path in changes(point)} for points_of_axis in alone]
    groups: list[set[int]] = []  # of axes that change the same keys, or keys within them
    for axis in axes:
        related = [group for group in groups if overlap(group, axis)]
        groups = [group for group in groups if group not in related] + [{axis}.union(*related)]
    for point in [*random.Random(0).sample(points, min(3, len(points))), points[-1]]:
        if sorted(map(repr, combine(point, groups).items())) != sorted(map(repr, parse(point).items())):
            groups = [set(axes)]
    return [combine(point, groups) for point in points]
