"""What the README, the pages of docs/ and the container's files say is there."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import CONSTANT, REPO, assert_same_run, error_of, main, metrics_of, printed_config

PAGES = {path.name: path.read_text() for path in [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]}
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", "\n".join(PAGES.values()), re.DOTALL | re.MULTILINE)
LINES = "".join(text for language, text in BLOCKS if language == "").replace("\\\n", "").splitlines()
COMMANDS = sorted({line.partition("  #")[0].strip() for line in LINES})
LOCK = (REPO / "requirements.lock").read_text()
DOCKERFILE = (REPO / "Dockerfile").read_text()
DEV, IMAGE = (stage.partition("\n")[2] for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:])


def starting(program: str) -> list[str]:
    """The arguments of the pages' commands that start so."""
    found = [command.removeprefix(program).strip() for command in COMMANDS if command.startswith(program)]
    assert found
    return found


@pytest.fixture
def clone(folder):
    """A working directory with the configs, the files that the pages print, and runs' config.yaml."""
    for name in ("configs", "benchmarks"):
        (folder / name).symlink_to(REPO / name)
    for _, text in BLOCKS:
        if name := re.match(r"# (\w+\.(?:py|yaml))", text):
            (folder / name[1]).write_text(text)
    for name, config in {"mnist": "base", "diffusion": "diffusion", "gpt": "gpt", "gpt_text": "gpt"}.items():
        run = folder / f"logs/{name}/version_0"
        run.mkdir(parents=True)
        shutil.copy(REPO / f"configs/{config}.yaml", run / "config.yaml")
    return folder


def test_links_and_pictures_are_files_and_headings():
    headings = {
        name: {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall("^#+ (.*)", page, re.M)}
        for name, page in PAGES.items()
    }
    found = 0
    for name, page in PAGES.items():
        links = [link for link in re.findall(r"\]\(([^)]+)\)", page) if "://" not in link]
        folder = REPO if name == "README.md" else REPO / "docs"
        for file, _, heading in (link.partition("#") for link in links):
            assert (folder / file).exists(), name
            assert not heading or heading in headings[Path(file).name or name], name
        found += len(links)
    assert found >= 40


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 170


@pytest.mark.parametrize("command", [command for command in starting("python main.py") if ".help" not in command])
def test_commands_of_main_are_understood(clone, capfd, command):
    assert printed_config(capfd, *[word for word in shlex.split(command) if word != "--print_config"])


def test_the_mistake_is_reported_as_printed(clone, capfd):
    command, line = re.search(r"^\$ python main.py (.*)\n(error: .*)$", PAGES["README.md"], re.MULTILINE).groups()
    assert error_of(capfd, *shlex.split(command)) == line


def test_other_commands_exist():
    targets = re.findall(r"^(\w[\w-]*):", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert {command.split()[0] for command in starting("make")} <= set(targets)
    assert all((REPO / "benchmarks" / command.split()[0]).exists() for command in starting("python benchmarks/"))


def test_a_data_module_and_a_model_as_printed(clone):
    (command,) = [command for command in starting("python main.py") if "--data=my_waves.Waves --model" in command]
    command = [*shlex.split(command), CONSTANT, "--trainer.max_epochs=3", "--wandb=null"]
    main([*command, "--run_dir=whole"])
    assert metrics_of(Path("whole"))["val/acc"] > 0.6
    main(["fit", "--config=whole/config.yaml", "--run_dir=again"])
    assert_same_run(Path("again"), Path("whole"))
    main([*command, "--run_dir=part", "--trainer.max_steps=50"])  # of 100 in an epoch
    main([*command, "--run_dir=resumed", "--ckpt_path=part/checkpoints/last.ckpt"])
    assert_same_run(Path("resumed"), Path("whole"))


# The container


def of(instruction: str, stage: str) -> list[str]:
    """What follows an instruction, each time that it occurs."""
    return re.findall(rf"^{instruction} (.*)", stage.replace("\\\n", ""), re.MULTILINE)


def test_each_locked_package_has_a_version_and_a_hash_and_no_host():
    packages = re.split(r"^(?=[^ #])", LOCK, flags=re.MULTILINE)[1:]
    assert len(packages) > 50
    for package in packages:
        assert re.match(r"[\w.-]+==[\w.!+]+( ; [^;]+?)? \\\n    --hash=sha256:[0-9a-f]{64}", package), package
    assert re.findall(r".*(?:://|--index|--find| @ |file:|/).*", LOCK) == []
    assert len(re.findall(r"^setuptools==", LOCK, re.MULTILINE)) == 1  # with which the image is built


def test_no_key_is_built_in():
    assert not re.search(r"^(ARG|ENV).*(KEY|WANDB)", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
    assert {"**/.env*", "**/.netrc", ".git", "wandb"} <= set((REPO / ".dockerignore").read_text().split())


def test_the_dev_container_is_the_image_without_its_code():
    text = (REPO / ".devcontainer/devcontainer.json").read_text()
    settings = json.loads(re.sub(r"^\s*//.*", "", text, flags=re.MULTILINE))
    build = settings["build"]
    assert (REPO / ".devcontainer" / build["dockerfile"]).samefile(REPO / "Dockerfile")
    assert (REPO / ".devcontainer" / build["context"]).samefile(REPO)
    assert re.search(rf"^FROM \S+ AS {build['target']}$", DOCKERFILE, re.MULTILINE)
    assert of("COPY", DEV) == ["requirements.lock /opt/"]
    assert of("WORKDIR", DEV) == [settings["workspaceFolder"]]
    assert f"target={settings['workspaceFolder']},type=bind" in settings["workspaceMount"]
    assert of("USER", DOCKERFILE) == [settings["remoteUser"]]
    assert of("EXPOSE", DEV) == ["6006"] and settings["forwardPorts"] == [6006]
    assert settings["hostRequirements"]["gpu"] == "optional"
    assert settings["postCreateCommand"].partition(" && ")[0] in of("RUN", IMAGE)
