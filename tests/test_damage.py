"""Files of a sweep that are cut off or overwritten: each is named, what it belongs to starts over, the page is made."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import BASE, SHORT, error_of
from sweeps import NAMES, in_new_process, less_times, settings

import report
import sweep

DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "less one byte": lambda content: content[:-1],
    "garbage": lambda content: (b"\xff\x00{[\xc3(" * len(content))[: len(content)],
    "text": lambda content: b"nothing of the kind\n",
}
SWEEP = Path("logs/sweeps/tiny")


@pytest.fixture(params=DAMAGES, ids=[name.replace(" ", "_") for name in DAMAGES])
def damage(request):
    """Damages a file in one of the ways."""

    def do(file: Path) -> Path:
        content = file.read_bytes()
        assert content
        file.write_bytes(DAMAGES[request.param](content))
        return file

    do.how = request.param
    return do


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished sweep with event files."""
    folder = tmp_path_factory.mktemp("finished")
    fixed = dict(option.removeprefix("--").split("=") for option in [BASE[2], *SHORT])
    fixed |= {"wandb": None, "num_threads": 1, "histograms": None, "trainer.max_epochs": 1}
    done = in_new_process(*settings(folder, fixed=fixed), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copy(finished, tmp_path, monkeypatch):
    """A copy of it, as working directory."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return less_times(SWEEP / "results.csv")


def page() -> str:
    """What a page says, written anew by report.py alone."""
    (SWEEP / "report.html").unlink(missing_ok=True)
    written = report.report(SWEEP).read_text()
    sweep.swept_values.cache_clear()  # the sweep is another process's
    return " ".join(re.sub(r"<script.*?</script>|<[^>]*>", " ", written, flags=re.DOTALL).split())


def ages() -> dict[str, int]:
    return {name: (SWEEP / name / "output.log").stat().st_ino for name in NAMES}


def best_checkpoint(run: Path) -> Path:
    return run / json.loads((run / "metrics.json").read_text())["best_checkpoint"]


def test_a_run_whose_files_are_damaged_is_named_and_starts_over(copy, damage, capfd):
    files = [
        SWEEP / NAMES[0] / "metrics.json",
        SWEEP / NAMES[1] / "config.yaml",
        best_checkpoint(SWEEP / NAMES[2]),
        next((SWEEP / NAMES[3]).glob("events.*")),
    ]
    for file in files:
        damage(file)
    shown, before = page(), ages()
    harmless = damage.how == "less one byte"  # the newline that ends config.yaml
    for file in files:
        assert str(file) in shown or (harmless and file.name == "config.yaml"), file
    assert sweep.main(["--config=tiny.yaml"]) == 0
    printed, errors = capfd.readouterr()
    assert errors == "" and "Traceback" not in printed
    for name, file in zip(NAMES, files):
        if harmless and file.name == "config.yaml":
            assert ages()[name] == before[name]
        else:
            assert re.search(rf"{re.escape(str(file))} .*, so {name} starts over", printed), printed
            assert ages()[name] != before[name]
    assert less_times(SWEEP / "results.csv") == copy
    assert "starts over" not in page()
    before = ages()
    assert sweep.main(["--config=tiny.yaml"]) == 0
    assert ages() == before and "starts over" not in capfd.readouterr().out


def test_a_checkpoint_that_was_deleted_is_no_damage(copy, capfd):
    before = ages()
    for name in NAMES:
        shutil.rmtree(SWEEP / name / "checkpoints")
    assert sweep.main(["--config=tiny.yaml"]) == 0
    assert ages() == before and "starts over" not in capfd.readouterr().out


def test_a_copied_sweep_is_none_the_worse(copy, capfd):
    before = ages()
    shutil.copytree("logs", "again")
    shutil.rmtree("logs")
    Path("again").rename("logs")
    before = ages()
    assert sweep.main(["--config=tiny.yaml"]) == 0
    assert ages() == before and less_times(SWEEP / "results.csv") == copy


def test_a_damaged_config_is_named_and_written_anew(copy, damage, capfd):
    """The runs are finished, with the config that the grid asks for, so they stay."""
    before = {path: path.read_bytes() for path in (*(SWEEP / "configs").iterdir(), SWEEP / "sweep.yaml")}
    damaged = [damage(SWEEP / "sweep.yaml"), damage(SWEEP / f"configs/{NAMES[1]}.yaml")]
    runs = ages()
    assert "4 runs" in page()
    assert sweep.main(["--config=tiny.yaml"]) == 0
    printed, errors = capfd.readouterr()
    assert errors == ""
    for file in damaged:
        assert f"{file} was damaged, and is written anew" in printed
        assert file.read_bytes() == before[file]
    assert ages() == runs and less_times(SWEEP / "results.csv") == copy


@pytest.mark.parametrize("end", ["\n", "0"], ids=["a line", "a digit"])
def test_a_config_that_is_cut_off_is_not_taken_for_another_one(copy, capfd, end):
    """As the config that is given, it would be filled up with the program's defaults."""
    config = SWEEP / f"configs/{NAMES[1]}.yaml"
    whole, before = config.read_text(), ages()
    config.write_text(cut := whole[: whole.rindex(end, 0, len(whole) - 1) + (end == "\n")])
    assert sweep.main([f"--run_dir={SWEEP}/configs"]) == 1
    assert capfd.readouterr().err.startswith(f"error: {config} is damaged: ")
    assert config.read_text() == cut and ages() == before
    assert sweep.main([f"--config={SWEEP}/sweep.yaml"]) == 0
    assert config.read_text() == whole and ages() == before
    assert sweep.main([f"--run_dir={SWEEP}/configs"]) == 0


def test_damaged_results_are_written_anew(copy, damage, capfd):
    for name in ("results.csv", "report.html"):
        damage(SWEEP / name)
    assert "4 of 4 runs are finished" in page()
    before = ages()
    assert sweep.main(["--config=tiny.yaml"]) == 0
    assert less_times(SWEEP / "results.csv") == copy and ages() == before


def test_notes_of_a_run_that_are_damaged_are_as_good_as_none(copy, damage):
    """status.json of a failed run, which is tried again in any case; files.json of a finished one."""
    (SWEEP / NAMES[0] / "metrics.json").unlink()
    noted = SWEEP / NAMES[0] / "status.json"
    noted.write_text(json.dumps({"status": "failed", "reason": "none", "time": 1.5}))
    damage(noted)
    damage(SWEEP / NAMES[1] / "files.json")
    before = ages()
    assert "3 of 4 runs are finished" in page()
    assert sweep.main(["--config=tiny.yaml"]) == 0
    assert [name for name in NAMES if ages()[name] != before[name]] == NAMES[:1]
    assert less_times(SWEEP / "results.csv") == copy


def test_main_names_a_damaged_file(copy, damage, capfd):
    """Of a run that is to be tested or resumed."""
    run = SWEEP / NAMES[0]
    cases = {
        best_checkpoint(run): ["test"],
        run / "checkpoints/last.ckpt": ["fit", "--ckpt_path=last"],
        run / "metrics.json": ["test", "--ckpt_path=best"],
        run / "config.yaml": ["test"],
    }
    for file, args in cases.items():
        if file.name == "config.yaml" and damage.how in ("half", "less one byte"):
            continue  # what is left of it is a config
        content = file.read_bytes()
        damage(file)
        line = error_of(capfd, args[0], f"--config={run}/config.yaml", *args[1:])  # the later wins
        assert str(run if file.name == "metrics.json" else file) in line
        file.write_bytes(content)
