"""report.html in a real Chromium: every chart is drawn, the console is empty, nothing is requested."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest
from browser import console_of, open_browser, requests_of, scrolls_sideways, set_look, wait_for
from made_runs import make_run
from viewed_runs import served
from written_runs import write_run

from gymexp.report.page import write_report
from gymexp.sweep.page import results_html
from gymexp.sweep.sweep_reader import read_sweep
from gymexp.sweep.table import rows_of
from gymexp.view.export import export
from gymexp.view.viewed_run import runs_at

pytestmark = pytest.mark.browser
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)<∕script>"
DRAWN = "document.documentElement.dataset.drawn"


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    run = make_run(tmp_path_factory.mktemp("runs") / "run", envs=(HOSTILE.replace("/", "∕"), "workplace"))
    return write_report(run).as_uri()


def test_each_panel_is_drawn_without_a_word_in_the_console_or_on_the_network(address):
    with open_browser() as driver:
        driver.get(address)
        wait_for(driver, DRAWN)
        num_charts, num_drawn = driver.execute_script(
            "const charts = [...document.querySelectorAll('.chart')];"
            " return [charts.length, charts.filter((c) => c.querySelector('svg .trace, svg .hm')).length]"
        )
        assert num_charts > 25 and num_drawn == num_charts
        first = driver.find_element("css selector", "#reward .chart")
        assert driver.execute_script("return arguments[0].querySelectorAll('path.js-line').length", first)
        driver.execute_script("Plotly.Fx.hover(arguments[0], {xval: 3})", first)
        assert not driver.find_elements("css selector", "img, .chart a")
        assert console_of(driver) == []
        assert set(requests_of(driver)) == {address}


def test_the_page_fits_a_telephone_and_follows_the_colour_scheme(address):
    with open_browser() as driver:
        set_look(driver, "light", 390)
        driver.get(address)
        wait_for(driver, DRAWN)
        assert not scrolls_sideways(driver)
        ink = "getComputedStyle(document.querySelector('#reward .xtick text')).fill"
        light = driver.execute_script(f"return {ink}")
        set_look(driver, "dark", 390)
        wait_for(driver, f"{ink} !== '{light}'")
        assert not scrolls_sideways(driver)
        set_look(driver, "dark", 1280)
        wait_for(driver, "document.querySelector('#reward .main-svg').clientWidth > 390")
        assert not scrolls_sideways(driver)
        assert console_of(driver) == []


def test_charts_over_steps_zoom_together_and_another_step_can_be_chosen(address):
    with open_browser() as driver:
        driver.get(address)
        wait_for(driver, DRAWN)
        driver.execute_script(
            "Plotly.relayout(document.querySelector('#reward .chart'),"
            " {'xaxis.range[0]': 5, 'xaxis.range[1]': 9})"
        )
        wait_for(driver, "document.querySelector('#loss .chart').layout.xaxis.range[1] === 9")
        driver.execute_script(
            "const choice = document.querySelector('#gantt select'); choice.selectedIndex = 1;"
            " choice.dispatchEvent(new Event('change'))"
        )
        title = "document.querySelector('#gantt .xtitle').textContent"
        wait_for(driver, f"{title}.includes('step 29')")
        time.sleep(0.3)
        assert console_of(driver) == []


def test_the_pointer_in_one_chart_shows_the_same_step_in_the_others_that_are_seen(address):
    from selenium.webdriver import ActionChains

    with open_browser(height=1600) as driver:
        driver.get(address)
        wait_for(driver, DRAWN)
        driver.execute_script("document.getElementById('reward').scrollIntoView()")
        first = driver.find_element("css selector", "#reward .chart")
        shown = (
            "[...document.querySelectorAll('.chart')].map((c) => [c.closest('section').id, c])"
            ".filter(([, c]) => c.querySelector('.hoverlayer .legend'))"
            ".map(([id, c]) => [id, c.querySelector('.hoverlayer .legendtitletext').textContent])"
        )
        ActionChains(driver).move_to_element(first).perform()
        wait_for(driver, f"{shown}.length > 3")
        found = driver.execute_script(f"return {shown}")
        assert {"reward", "success", "groups"} <= {panel for panel, _ in found}
        assert len({step for _, step in found}) == 1, "one step in all of them"
        heading = driver.find_element("css selector", "#reward h2")
        ActionChains(driver).move_to_element(heading).perform()
        wait_for(driver, f"{shown}.length === 0")
        assert console_of(driver) == []


def test_a_click_on_a_point_of_a_file_that_lies_alone_does_nothing(address):
    with open_browser() as driver:
        driver.get(address)
        wait_for(driver, DRAWN)
        click_on(driver, "#reward", 5)
        time.sleep(0.5)
        assert driver.current_url == address and console_of(driver) == []


def click_on(driver, panel: str, step: int) -> None:
    """Clicks with the pointer on the first line of a panel, at a step."""
    from selenium.webdriver import ActionChains

    chart = driver.find_element("css selector", f"{panel} .chart")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    x, y = driver.execute_script(
        "const [chart, step] = arguments, place = chart.getBoundingClientRect(), full = chart._fullLayout;"
        "return [full.xaxis._offset + full.xaxis.d2p(step) - place.width / 2, 0]",
        chart,
        step,
    )
    ActionChains(driver).move_to_element_with_offset(chart, round(x), round(y)).pause(0.3).click().perform()


def download(driver, folder: Path, button: str) -> list[list[str]]:
    """The cells of the CSV that a button saves."""
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    driver.execute_script(f"document.querySelector('{button}').click()")
    until = time.monotonic() + 30
    while not (files := list(folder.glob("*.csv"))):
        assert time.monotonic() < until, f"{button} saved nothing"
        time.sleep(0.1)
    [file] = files
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.reader(opened))


def test_a_panels_data_is_saved_as_csv_with_numbers_as_numbers(tmp_path):
    """Against metrics.jsonl. The names are a formula, a comma and a quote."""
    formula, other = '=HYPERLINK("x"),1', "+2@workplace"
    run = make_run(tmp_path / "run", steps=12, envs=(formula, other))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with open_browser() as driver:
        driver.get(write_report(run).as_uri())
        wait_for(driver, DRAWN)
        for name in ("lines", "table", "map"):
            (tmp_path / name).mkdir()
        head, *rows = download(driver, tmp_path / "lines", "#reward > button")
        assert head == ["chart", "series", "optimizer step", "value", "unit"]
        assert {row[0] for row in rows} == {f"'{formula}", f"'{other}"}
        values = [(int(row[2]), float(row[3])) for row in rows if row[:2] == [f"'{other}", "each step"]]
        expected = [(one["step"], one[f"{other}/reward"]) for one in metrics if "loss" in one]
        assert [step for step, _ in values] == [step for step, _ in expected]
        assert [value for _, value in values] == pytest.approx([value for _, value in expected], rel=1e-3)
        head, *rows = download(driver, tmp_path / "table", "#held-out .scroll + button")
        assert head[0] == "environment" and [row[0] for row in rows] == [f"'{formula}", f"'{other}"]
        change = rows[0][head.index("change")]
        assert change[0] in "+-" and float(change), "a sign makes no formula of a number"
        head, *rows = download(driver, tmp_path / "map", "#tasks > button")
        assert head == ["chart", "series", "evaluation after step", "of", "value"]
        assert len(rows) == 2 * 20 * 4 and {float(row[4]) for row in rows} == {0.0, 1.0}
        assert console_of(driver) == []


def test_a_click_on_a_point_opens_the_page_of_its_step_in_the_viewer_and_in_an_export(tmp_path):
    run = make_run(tmp_path / "run", steps=9)
    with open_browser() as driver, served(run) as viewer:
        driver.get(viewer.access.url)
        wait_for(driver, DRAWN)
        click_on(driver, "#reward", 5)
        wait_for(driver, "location.pathname.endsWith('/step/step-000005')")
        driver.back()
        wait_for(driver, DRAWN)
        click_on(driver, "#held-out", 6)
        wait_for(driver, "location.pathname.endsWith('/step/eval-000006')")
        assert console_of(driver) == []
    export(runs_at([run], None), tmp_path / "out", "5:6", None, None)
    page = (tmp_path / "out" / "index.html").as_uri()
    with open_browser() as driver:
        driver.get(page)
        wait_for(driver, DRAWN)
        click_on(driver, "#reward", 7)
        time.sleep(0.5)
        assert driver.current_url == page, "the export does not have step 7"
        click_on(driver, "#reward", 5)
        wait_for(driver, "location.pathname.endsWith('/out/step-000005.html')")
        assert console_of(driver) == []


def test_a_point_of_a_sweeps_page_leads_to_the_report_of_its_run(tmp_path):
    for number, rate in enumerate(("1e-5", "1e-4")):
        write_run(tmp_path / str(number), [f"trainer.learning_rate={rate}", "seed=0"], gain=number)
    (tmp_path / "1" / "report.html").write_text("<title>of run 1</title>")
    sweep = read_sweep(tmp_path)
    (tmp_path / "sweep.html").write_text(results_html(sweep, rows_of(sweep)))
    with open_browser() as driver:
        page = (tmp_path / "sweep.html").as_uri()
        driver.get(page)
        wait_for(driver, DRAWN)
        assert (
            not scrolls_sideways(driver) and console_of(driver) == [] and set(requests_of(driver)) == {page}
        )
        points = driver.find_elements("css selector", "#finals .chart path.point")
        click_on_element(driver, points[0])
        time.sleep(0.5)
        assert driver.current_url == page, "run 0 has no report"
        click_on_element(driver, points[1])
        wait_for(driver, "document.title === 'of run 1'")


def click_on_element(driver, element) -> None:
    from selenium.webdriver import ActionChains

    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    ActionChains(driver).move_to_element(element).pause(0.3).click().perform()
