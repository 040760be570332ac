"""TensorBoard over two runs and a run of a sweep, as its server and a real browser show them."""

import contextlib
import json
import time

import pytest
from conftest import FIT, main, metrics_of, tensorboard
from selenium.common.exceptions import WebDriverException

NAMES = ["mnist/version_0", "mnist/version_1", "sweeps/few/000-l1_chan=6"]
WALK = """
const found = []
const walk = node => {
  if (node.shadowRoot) walk(node.shadowRoot)
  if (node.nodeName == 'IMG') found.push(node.naturalWidth)
  for (const child of node.childNodes) {
    if (child.nodeType == 3) found.push(child.textContent.trim())
    else if (!/SCRIPT|STYLE/.test(child.nodeName)) walk(child)
  }
}
walk(document.body)
"""
ALL_TEXT = WALK + "return found.filter(item => item && typeof item == 'string')"
ALL_PICTURES = WALK + "return found.filter(item => typeof item == 'number')"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dashboards")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for l1_chan, name in zip((4, 8, 6), NAMES):
            main([*FIT, "--wandb=null", f"--model.net.l1_chan={l1_chan}", f"--run_dir=logs/{name}"])
    with tensorboard(folder / "logs") as (url, get):
        yield url, get, folder / "logs"


def see(browser, url: str, enough, script: str = ALL_TEXT) -> list:
    """Opens a page and waits until what it shows is enough."""
    browser.get("about:blank")
    browser.get(url)
    end = time.monotonic() + 60
    while True:
        shown = []
        with contextlib.suppress(WebDriverException):  # the page is still being built
            shown = browser.execute_script(script)
            if enough(shown):
                return shown
        assert time.monotonic() < end, shown
        time.sleep(0.5)


def shows(*wanted: str):
    return lambda texts: all(text in " ".join(texts) for text in wanted)


def test_hparams_begin_with_what_differs_and_have_the_metrics(server, browser):
    url, get, runs = server
    experiment = get("plugin/hparams/experiment", {})
    assert experiment["hparamInfos"][0]["name"] == "model.net.l1_chan"
    assert [info["differs"] for info in experiment["hparamInfos"]][:2] == [True, False]
    ask = {"allowedStatuses": ["STATUS_SUCCESS"], "colParams": [], "startIndex": 0, "sliceSize": 10}
    groups = get("plugin/hparams/session_groups", ask)["sessionGroups"]
    assert {group["name"]: group["hparams"]["model.net.l1_chan"] for group in groups} == dict(zip(NAMES, (4, 8, 6)))
    for group in groups:
        metrics = metrics_of(runs / group["name"])
        values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        for tag in ("best/val/acc", "best/val/loss", "test/acc", "test/loss"):
            assert values[tag] == pytest.approx(metrics[tag.removeprefix("best/")], rel=1e-6)
    see(browser, f"{url}/#hparams", shows("l1_chan", *NAMES))


def test_scalars_have_each_run_and_the_metrics(server, browser):
    shown = see(browser, f"{server[0]}/#scalars&tagFilter=val", shows("tag: val/loss", "tag: val/acc"))
    assert set(NAMES) <= set(shown)


def test_custom_scalars_have_training_and_validation_together(server, browser):
    assert "train and val" in json.dumps(server[1]("plugin/custom_scalars/layout"))
    shown = see(browser, f"{server[0]}/#custom_scalars", shows("train and val", "Matches"))
    assert {"loss", "acc", *NAMES} <= set(shown)


def test_histograms_have_the_names_of_the_layers(server, browser):
    see(browser, f"{server[0]}/#histograms&tagFilter=conv1", shows("tag: act/net.conv1", *NAMES))


def test_images_are_shown(server, browser):
    see(browser, f"{server[0]}/#images", shows("tag: test/confusion_matrix", "tag: test/worst_classified"))
    widths = see(browser, f"{server[0]}/#images", lambda widths: len([w for w in widths if w]) == 6, ALL_PICTURES)
    assert min(width for width in widths if width) >= 600


def test_the_graph_shows_the_net(server, browser):
    shown = see(browser, f"{server[0]}/#graphs", lambda texts: any("CNN" in text for text in texts))
    assert set(NAMES) <= set(shown)
