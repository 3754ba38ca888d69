"""The viewer in a real Chromium: opened, sorted, filtered, paged, followed live, exported, and quiet."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time

import pytest
from browser import FITS, console_of, open_browser, requests_of, scrolls_sideways, set_look, wait_for
from viewed_runs import ENVS, entry, played, served, write_large_run, write_run

from gymexp.rollout.outcome import Completed
from gymexp.rollout.rollout_files import RolloutWriter
from gymexp.view.export import export
from gymexp.view.viewed_run import runs_at

pytestmark = pytest.mark.browser
PAGES = (
    "", "steps", "step/step-000002", "group/step-000002/0", "rollouts", "tasks", "compare", "config",
    "rollout/step-000002/0", "rollout/step-000002/0/tokens",
)  # fmt: skip
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]"
LISTED = "[...document.querySelectorAll('tr.row a.go')].map((link) => link.textContent)"


@pytest.fixture(scope="module")
def driver():
    with open_browser() as driver:
        yield driver


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def forget(driver) -> None:
    """Leaves the page of another test, whose server has ended."""
    driver.get("about:blank")
    console_of(driver)
    requests_of(driver)


def open_first(driver, viewer) -> str:
    """Opens the printed address; returns the address of the run's page, which no longer has the token."""
    forget(driver)
    driver.get(viewer.access.url)
    assert driver.current_url == viewer.base + viewer.root and viewer.access.token not in driver.page_source
    return driver.current_url


def first_paint(driver, address: str) -> float:
    """Milliseconds until a page is first painted, the best of three."""
    paints = []
    for _ in range(3):
        driver.get(address)
        paints.append(wait_for(driver, f"{FIRST_PAINT} && {FIRST_PAINT}.startTime"))
    return min(paints)


def is_quiet(driver, allowed: str) -> None:
    """Neither a line in the console nor a request to anywhere else."""
    assert console_of(driver) == []
    assert [url for url in requests_of(driver) if not url.startswith(allowed)] == []


def test_a_reader_finds_a_rollout_and_its_tokens_by_clicking_and_by_keys(driver, run):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    with served(run) as viewer:
        open_first(driver, viewer)
        assert wait_for(driver, "document.documentElement.dataset.drawn")  # the charts
        driver.find_element(By.LINK_TEXT, "Rollouts").click()
        driver.find_element(By.LINK_TEXT, "reward").click()
        driver.find_element(By.LINK_TEXT, "reward").click()
        rewards = (
            "[...document.querySelectorAll('tr.row')].map((row) => parseFloat(row.cells[3].textContent))"
        )
        shown = [value for value in driver.execute_script(f"return {rewards}") if value is not None]
        assert len(shown) == 27 and shown == sorted(shown, reverse=True)
        driver.find_element(By.TAG_NAME, "body").send_keys("/")
        driver.switch_to.active_element.send_keys("office" + Keys.ENTER)
        wait_for(driver, "location.search.includes('text=office')")
        assert driver.execute_script(f"return {LISTED}") == ["0", "3", "2", "1"]
        driver.find_element(By.TAG_NAME, "body").send_keys("j" + Keys.ENTER)
        wait_for(driver, "location.pathname.endsWith('/rollout/step-000002/0')")
        driver.find_element(By.TAG_NAME, "body").send_keys("j")  # the next of the list, not of the file
        wait_for(driver, "location.pathname.endsWith('/rollout/step-000002/3')")
        driver.find_element(By.TAG_NAME, "body").send_keys("t")
        wait_for(driver, "location.pathname.endsWith('/3/tokens')")
        driver.find_element(By.CSS_SELECTOR, "[data-heat=trained]").click()
        colour = "getComputedStyle(document.querySelector('#tokens .y')).backgroundColor"
        trained = driver.execute_script(f"return {colour}")
        driver.find_element(By.CSS_SELECTOR, "[data-heat=none]").click()
        assert driver.execute_script(f"return {colour}") != trained == "rgb(195, 220, 240)"
        driver.find_element(By.CSS_SELECTOR, "[data-heat=logprob]").click()
        token = driver.find_element(By.CSS_SELECTOR, "#tokens .n8")
        webdriver.ActionChains(driver).move_to_element(token).perform()
        hover = driver.find_element(By.ID, "hover").text
        assert "id 2\n" in hover and "-4.0000 nats (1.8 %)" in hover and hover.endswith("trained")
        copied = driver.current_url
        driver.switch_to.new_window("tab")
        driver.get(copied)
        shown = driver.execute_script("return document.querySelector('#tokens').textContent")
        assert shown.startswith("Today's date is") and shown.endswith("\n<|im_end|>")
        is_quiet(driver, viewer.base)
        driver.close()
        driver.switch_to.window(driver.window_handles[0])
        is_quiet(driver, viewer.base)


def test_what_a_policy_wrote_runs_nothing_and_a_long_line_does_not_hang(driver, run):
    with served(run) as viewer:
        address = open_first(driver, viewer)
        for page in ("rollout/step-000002/0", "group/step-000002/0", "rollouts", "log/office.log"):
            driver.get(address + page)
            assert "<script>alert(1)</script>" in driver.execute_script("return document.body.innerText")
            assert (
                driver.execute_script("return document.querySelectorAll('main script, main img').length") == 0
            )
        began = time.monotonic()
        driver.get(f"{address}rollout/step-000002/2")
        driver.get(f"{address}text/step-000002/2/2?page=3")
        assert time.monotonic() - began < 8
        assert not scrolls_sideways(driver)
        is_quiet(driver, viewer.base)


def test_a_live_run_is_followed_and_a_resume_that_takes_steps_back_too(driver, run):
    with served(run) as viewer:
        address = open_first(driver, viewer)
        driver.get(f"{address}steps?split=train")
        assert driver.execute_script(f"return {LISTED}") == ["step 2", "step 1"]
        writer = RolloutWriter(run / "rollouts", ENVS, last_step=2)
        writer.write("step-000003", [Completed(played("sudoku/train/1", 1.0)) for _ in range(4)], 4)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(entry(3)) + "\n")
        wait_for(driver, f"{LISTED}.join() === 'step 3,step 2,step 1'", 3)
        RolloutWriter(run / "rollouts", ENVS, last_step=1)
        wait_for(driver, f"{LISTED}.join() === 'step 1'", 3)
        driver.get(address)
        wait_for(driver, "document.documentElement.dataset.drawn")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(entry(4)) + "\n")
        RolloutWriter(run / "rollouts", ENVS, 1).write(
            "step-000004", [Completed(played("sudoku/train/1", 1))], 1
        )
        wait_for(driver, "document.body.innerText.includes('step 4')", 3)
        is_quiet(driver, viewer.base)


def test_ten_thousand_rollouts_are_painted_within_two_seconds_and_paged(driver, tmp_path):
    run = write_large_run(tmp_path / "run", 10_000)
    with served(run) as viewer:
        address = open_first(driver, viewer)
        pages = ("", "step/step-000009", "rollouts?sort=reward&order=down", "rollout/step-000009/17", "tasks")
        for page in (*pages, "rollouts?text=hm", "compare?a=step-000001&b=step-000009"):
            paint = first_paint(driver, address + page)
            print(f"{page or 'run'}: first paint {paint:.0f} ms")
            assert paint < 2000, page
        driver.get(f"{address}rollouts?env=office&min=0.75")
        addresses = LISTED.replace("textContent", "href.split('?')[0]")
        first = driver.execute_script(f"return {addresses}")
        assert len(set(first)) == 100
        driver.execute_script("document.querySelector('a[rel=next]').click()")
        wait_for(driver, "location.search.includes('page=2') && document.readyState === 'complete'")
        second = driver.execute_script(f"return {addresses}")
        assert len(second) == 100 and not set(first) & set(second)
        is_quiet(driver, viewer.base)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_scrolls_sideways_on_a_phone(driver, run, scheme):
    try:
        with served(run) as viewer:
            address = open_first(driver, viewer)
            set_look(driver, scheme, 390)
            for page in PAGES if scheme == "light" else PAGES[::4]:
                driver.get(address + page)
                wait_for(driver, "!document.querySelector('.chart') || document.querySelector('.main-svg')")
                wait_for(driver, FITS, timeout_s=10)  # a chart is wider until it is drawn anew in its place
                paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
                assert (sum(map(int, paper[4:-1].split(", "))) < 200) == (scheme == "dark")
            is_quiet(driver, viewer.base)
    finally:
        set_look(driver)
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_an_export_opens_from_files_alone(driver, run, tmp_path):
    from selenium.webdriver.common.by import By

    said = export(runs_at([run], None), tmp_path / "page", "2:", "office", None)
    assert "4 of 28 rollouts" in said
    shutil.rmtree(run)
    forget(driver)
    driver.get((tmp_path / "page" / "index.html").as_uri())
    wait_for(driver, "document.documentElement.dataset.drawn")
    driver.find_element(By.LINK_TEXT, "Rollouts").click()
    assert "4 of 28 rollouts" in driver.find_element(By.TAG_NAME, "body").text
    head = driver.find_element(By.XPATH, "//th/button[text()='reward']")
    head.click()
    assert driver.execute_script(f"return {LISTED}") == ["2", "3", "0", "1"]
    head.click()
    assert driver.execute_script(f"return {LISTED}") == ["0", "3", "2", "1"]
    driver.find_element(By.ID, "filter").send_keys("timeout")
    shown = "[...document.querySelectorAll('tr.row')].filter((row) => row.checkVisibility()).length"
    assert driver.execute_script(f"return {shown}") == 1
    driver.find_element(By.LINK_TEXT, "1").click()
    assert "slow <script>alert(1)</script>" in driver.find_element(By.TAG_NAME, "body").text
    driver.get((tmp_path / "page" / "step-000002-0-tokens.html").as_uri())
    driver.find_element(By.CSS_SELECTOR, "button[data-heat=trained]").click()
    assert driver.execute_script("return document.querySelector('#tokens').className").endswith(
        "heat-trained"
    )
    driver.get((tmp_path / "page" / "tasks.html").as_uri())
    wait_for(driver, "document.documentElement.dataset.drawn")
    driver.find_element(By.CSS_SELECTOR, ".chart .nsewdrag").click()  # its only cell
    wait_for(driver, "location.pathname.endsWith('/page/step-000002-group-0.html')", 10)
    driver.get((tmp_path / "page" / "step-000002-0-tokens.html").as_uri())
    links = "[...document.querySelectorAll('a[href], link[href], script[src]')].map((a) => a.href || a.src)"
    addresses = driver.execute_script(f"return {links}")
    assert all(url.startswith(((tmp_path / "page").as_uri(), "data:,")) for url in addresses)
    is_quiet(driver, (tmp_path / "page").as_uri())


def test_a_text_is_searched_while_the_page_is_read(driver, tmp_path):
    run = write_large_run(tmp_path / "run", 10_000)
    with served(run) as viewer:
        address = open_first(driver, viewer)
        read, open_ = viewer.run.files.read_frame, threading.Event()
        frames = itertools.count()

        def slow(name: str, offset: int, length: int) -> list[bytes]:
            if next(frames) >= 3:
                assert open_.wait(60)
            return read(name, offset, length)

        viewer.run.files.read_frame = slow
        for page in (
            "rollouts?text=hm",
            "rollouts?text=Nowhere+to+be+found",
            "tasks",
            "step/step-000009?text=hm",
        ):
            paint = first_paint(driver, address + page)
            print(f"{page} during a search: first paint {paint:.0f} ms")
            assert paint < 2000, page
        driver.get(f"{address}rollouts?text=Nowhere")
        assert "searched 0 of 10112 rollouts" in driver.find_element("tag name", "main").text
        open_.set()
        wait_for(driver, "document.body.innerText.includes('searched 10112 of 10112 rollouts')")
        assert driver.execute_script("return document.getElementById('count').textContent") == "0"
        is_quiet(driver, viewer.base)


def test_a_link_is_copied_without_the_token(driver, run):
    with served(run) as viewer:
        address = open_first(driver, viewer)
        allowed = {"origin": viewer.base, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        driver.execute_cdp_cmd("Browser.grantPermissions", allowed)
        page = f"{address}rollouts?env=office&sort=reward"
        for opened in (
            f"{page}&token={viewer.access.token}",
            f"{address}rollout/step-000002/0/tokens?heat=ratio",
        ):
            driver.get(opened)
            driver.find_element("id", "copy-link").click()
            wait_for(driver, "document.getElementById('copy-link').textContent === 'copied'")
            copied = driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
            assert copied == opened.split("&token=")[0]
        is_quiet(driver, viewer.base)
        # A browser that lets no page write to its clipboard but by a command.
        driver.execute_script("navigator.clipboard.writeText = () => Promise.reject(new Error('no'))")
        driver.find_element("id", "copy-link").click()
        wait_for(driver, "document.getElementById('copy-link').textContent === 'copied'")
