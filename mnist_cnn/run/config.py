"""Reads config files without jsonargparse."""

import json
from pathlib import Path
from typing import Any


def swept_values(path: Path) -> dict[str, Any]:
    """The swept settings (key -> value) that sweep.py writes into a config's first line; {} for other files."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    return json.loads(line.removeprefix("# swept: ")) if line.startswith("# swept: ") else {}


def flatten(config: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The leaves of a nested config: path of keys -> value. Lists and empty mappings are leaves."""
    if not isinstance(config, dict) or not config:
        return {path: config}
    return {leaf: value for key, inner in config.items() for leaf, value in flatten(inner, (*path, key)).items()}
