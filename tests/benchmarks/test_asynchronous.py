"""What the page on workers shows is what was measured, and figures follow from curves and bytes."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from benchmarks.asynchronous.render import PAGE, PLOT, newest, page_with, plot_of
from benchmarks.asynchronous.run import figures, table
from benchmarks.asynchronous.setting import CONTENDERS, REFERENCE
from benchmarks.common.curves import curves_svg


def run(loss: float, sent_bytes: int, num_workers: int = 2) -> dict[str, object]:
    held_out = [[32, loss + 1], [64, loss]]
    return {
        "num_workers": num_workers,
        "losses": [loss] * 30,
        "held_out": held_out,
        "sent_bytes": sent_bytes,
        "tokens": 64_000,
    }


def test_figures_compare_with_the_synchronous_run() -> None:
    runs = {REFERENCE: run(5.0, 6400), "DiLoCo, 4 workers": run(5.05, 200, 4)}
    assert figures(runs) == {
        "diloco_4_workers_fewer_bytes": 32.0,
        "diloco_4_workers_held_out_loss": 1.01,
        "diloco_4_workers_training_loss": 1.01,
    }
    assert "| DiLoCo, 4 workers | 5.050 (+1.0%) | 5.050 | 0 | 32.0× | 64,000 |" in table(runs)


def test_contenders_have_names_of_their_own_and_one_is_the_reference() -> None:
    names = [contender.name for contender in CONTENDERS]
    assert len(set(names)) == len(names)
    assert names[0] == REFERENCE
    assert not CONTENDERS[0].overrides


def test_a_plot_has_a_line_for_every_curve_within_its_frame() -> None:
    curves = {"a": [(0, 8.0), (320, 5.0)], "b": [(0, 7.0), (320, 5.5)]}
    root = ET.fromstring(curves_svg(curves, x="step", y="loss", title="t"))
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2
    for line in lines:
        for point in line.attrib["points"].split():
            across, down = map(float, point.split(","))
            assert 0 <= across <= 760
            assert 0 <= down <= 380


def test_the_page_and_its_plot_show_the_newest_results() -> None:
    record = newest()
    assert record is not None
    page = PAGE.read_text()
    assert page_with(page, record) == page
    assert plot_of(record) == PLOT.read_text()
