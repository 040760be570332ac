"""What the README says is there."""

import re
import shlex

import pytest
from conftest import REPO, main

README = (REPO / "README.md").read_text()


def test_links_and_pictures_are_files():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert len(targets) >= 10
    assert [target for target in targets if not (REPO / target).exists()] == []


@pytest.mark.parametrize(
    "command",
    [line.partition("#")[0] for line in README.splitlines() if line.startswith("python main.py fit --config configs")],
)
def test_commands_are_understood(folder, monkeypatch, capsys, command):
    (folder / "configs").symlink_to(REPO / "configs")
    (folder / "my_nets.py").write_text(re.search(r"```python\n(# my_nets.py.*?)```", README, re.DOTALL)[1])
    (folder / "my_data.py").write_text("import mnist_cnn\n\nclass MyDataModule(mnist_cnn.MNISTDataModule):\n    pass\n")
    (folder / "my_models.py").write_text(
        "import mnist_cnn\n\nclass MyLightningModule(mnist_cnn.LitClassifier):\n    pass\n"
    )
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(SystemExit) as ended:
        main([*shlex.split(command)[2:], "--print_config"])
    assert ended.value.code == 0, capsys.readouterr().err
