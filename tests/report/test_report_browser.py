"""report.html in a real Chromium: every chart is drawn, the console is empty, nothing is requested."""

from __future__ import annotations

import time

import pytest
from browser import console_of, open_browser, requests_of, scrolls_sideways, set_look, wait_for
from made_runs import make_run

from gymexp.report.page import write_report

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
