"""report.html in a real browser."""

from pathlib import Path

import pytest
from test_report import GRID, NAMES, SWEEP, write_events, write_run, write_tiny

from mnist_cnn.sweeps.report import report


@pytest.fixture
def page(tmp_path, monkeypatch, browser):
    """The page of a finished sweep of four runs, in the browser."""
    monkeypatch.chdir(tmp_path)
    write_tiny()
    browser.get(Path(report(SWEEP)).absolute().as_uri())
    return browser


def cells(page, column: int) -> list[str]:
    return [cell.text for cell in page.find_elements("css selector", f"#runs tbody td:nth-child({column})")]


def test_a_click_sorts_the_table(page):
    heads = page.find_elements("css selector", "#runs th")
    names = [head.text for head in heads]
    for name, in_order in (
        ("val/acc", ["0.9100", "0.9300", "0.9400", "0.9600"]),
        ("nesterov", ["false", "false", "true", "true"]),
        ("run", ["000", "001", "002", "003"]),
    ):
        column = names.index(name)
        for expected in (in_order, in_order[::-1]):
            heads[column].click()
            assert cells(page, column + 1) == expected
    assert sorted(zip(cells(page, 1), cells(page, names.index("val/acc") + 1))) == [
        ("000", "0.9100"),
        ("001", "0.9300"),
        ("002", "0.9600"),
        ("003", "0.9400"),
    ]


def test_plots_and_pictures_are_drawn(page):
    losses, parallel, curves = page.find_elements("css selector", ".plotly-graph-div")
    assert all(plot.find_elements("css selector", "svg.main-svg") for plot in (losses, parallel, curves))
    assert "train/loss" in losses.text and "val/loss" in losses.text
    shares = [float(meter.get_property("value")) for meter in page.find_elements("css selector", "meter")]
    assert shares == pytest.approx([0.7, 0], abs=1e-6)  # l1_chan, nesterov
    assert all(text in parallel.text for text in ("l1_chan", "nesterov", "val/acc", "true", "false"))
    lines = curves.find_elements("css selector", ".cartesianlayer path.js-line")
    assert len(lines) == 4
    assert [line.value_of_css_property("stroke") for line in lines].index("rgb(214, 39, 40)") == 3  # the best in front
    pictures = page.find_elements("css selector", "img")
    assert [picture.get_property("naturalWidth") for picture in pictures] == [600, 600]


def test_an_axis_has_different_labels_also_if_the_losses_are_close(tmp_path, monkeypatch, browser):
    monkeypatch.chdir(tmp_path)
    write_run(NAMES[0], GRID[0], {"val/acc": 0.5}, events=False)
    write_events(SWEEP / NAMES[0], [0.6934, 0.6931])
    browser.get(Path(report(SWEEP)).absolute().as_uri())
    *_, curves = browser.find_elements("css selector", ".plotly-graph-div")
    labels = [label.text for label in curves.find_elements("css selector", ".ytick text")]
    assert len(labels) == len(set(labels)) > 2


def test_the_page_needs_no_network_and_reports_no_error(page):
    addresses = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [address for address in addresses if not address.startswith("data:")] == []
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
