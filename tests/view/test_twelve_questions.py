"""The twelve questions of docs/guides/look.md, answered in a real Chromium by clicking from the run's page.

What a page says is compared with the run's records, which this file reads by itself.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import pytest
import zstandard
from asked_run import DROP, GROUP, HELD_OUT, STEPS, write_asked_run
from browser import console_of, open_browser, requests_of, wait_for
from viewed_runs import served

pytestmark = pytest.mark.browser
T_7 = 2.3646  # Student's t, 97.5 %, 7 degrees of freedom: 8 tasks
Outcome = dict[str, Any]


class Records:
    """The records of a run directory. files: the outcomes of each file of rollouts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = {
            file.name.removesuffix(".jsonl.zst"): _lines(file)
            for file in sorted((path / "rollouts").glob("*.jsonl.zst"))
        }
        entries = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        self.steps = {entry["step"]: entry for entry in entries if "time/step" in entry}

    def of(self, kind: str) -> dict[int, list[Outcome]]:
        """The outcomes of `step` or `eval` files by step."""
        names = [name for name in self.files if name.startswith(kind) and not name.endswith(".train")]
        return {int(name.split("-")[1]): self.files[name] for name in names}

    def groups(self, step: int) -> list[list[Outcome]]:
        outcomes = self.of("step")[step]
        return [outcomes[start : start + GROUP] for start in range(0, len(outcomes), GROUP)]


def _lines(path: Path) -> list[Outcome]:
    with zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True) as reader:
        return [json.loads(line) for line in io.TextIOWrapper(reader, "utf-8")]


def key_of(outcome: Outcome) -> str:
    return outcome.get("rollout", outcome)["task"]["key"]


def env_of(outcome: Outcome) -> str:
    return key_of(outcome).split("/")[0]


def reward_of(outcome: Outcome) -> float | None:
    return outcome["rollout"]["reward"] if "rollout" in outcome else None


def mean_of(outcomes: list[Outcome]) -> float:
    return fmean(reward for o in outcomes if (reward := reward_of(o)) is not None)


def last_words(outcome: Outcome) -> str:
    return outcome["rollout"]["items"][-1]["content"][0]["text"]


def paired(before: list[Outcome], after: list[Outcome], env: str) -> tuple[float, float, float, float]:
    """(mean change, low, high, p by sign flips) of eight tasks, each played once in both."""
    rewards = [{key_of(o): reward_of(o) for o in of if env_of(o) == env} for of in (before, after)]
    changes = [rewards[1][key] - rewards[0][key] for key in rewards[0]]
    assert len(changes) == HELD_OUT
    mean, half = fmean(changes), T_7 * stdev(changes) / math.sqrt(len(changes))
    flips = [
        fmean(sign * change for sign, change in zip(signs, changes, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(changes))
    ]
    p = fmean(abs(flip) >= abs(mean) - 1e-9 for flip in flips)
    return mean, mean - half, mean + half, p


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Records]:
    made = tmp_path_factory.mktemp("runs")
    return [Records(write_asked_run(made / f"seed{n}", n, gain)) for n, gain in ((0, 1.0), (1, 0.25))]


@pytest.fixture(scope="module")
def viewer(runs):
    with served(*(run.path for run in runs)) as one:
        yield one


@pytest.fixture(scope="module")
def driver():
    with open_browser() as one:
        yield one


class Reader:
    """Who reads the pages: opens the list of runs, and from there only clicks."""

    def __init__(self, driver, viewer) -> None:
        self.driver = driver
        self.driver.get(viewer.access.url)
        self.open(driver.find_element("partial link text", "seed0"))
        wait_for(driver, "document.documentElement.dataset.drawn")

    def find(self, css: str):
        return self.driver.find_element("css selector", css)

    def click(self, text: str, within: str = "") -> None:
        """Follows the link whose text begins so."""
        path = f"{within}//a[starts-with(normalize-space(), {json.dumps(text)})]"
        self.open(self.driver.find_element("xpath", path))

    def open(self, element) -> None:
        element.click()
        wait_for(self.driver, "document.readyState === 'complete'")

    def text(self, css: str = "main") -> str:
        return self.find(css).text

    def rows(self, css: str) -> list[list[str]]:
        """The cells of a table's rows."""
        script = f"return [...document.querySelectorAll('{css} tbody tr')].map((row) => "
        return self.driver.execute_script(script + "[...row.cells].map((cell) => cell.innerText.trim()))")

    def row(self, css: str, first: str) -> list[str]:
        """The row of a table that begins with this cell."""
        [row] = [row for row in self.rows(css) if row[0] == first]
        return row

    def series(self, panel: str, name: str, chart: int = 0) -> dict[int, float]:
        """What a line, or a stack, of a drawn chart shows by step."""
        script = (
            f"const chart = document.querySelectorAll('#{panel} .chart')[{chart}];"
            "return chart.data.filter((d) => d.name === arguments[0] && d.showlegend !== false)"
            ".map((d) => [d.x || d.y.map((_, at) => d.x0 + at * d.dx), d.y])[0]"
        )
        steps, values = self.driver.execute_script(script, name)
        return {int(step): value for step, value in zip(steps, values, strict=True)}


@pytest.fixture
def reader(driver, viewer):
    yield Reader(driver, viewer)
    assert console_of(driver) == []
    assert [url for url in requests_of(driver) if not url.startswith((viewer.base, "about:"))] == []


def test_1_did_it_get_better_beyond_noise_in_each_environment(reader, runs):
    evaluations = runs[0].of("eval")
    before, after = evaluations[0], evaluations[STEPS]
    expected = {env: paired(before, after, env) for env in ("sudoku", "workplace")}
    p_sudoku = min(1.0, 2 * expected["sudoku"][3])  # Holm: the smaller of two
    for env, (mean, low, high, _) in expected.items():
        cells = reader.row("#held-out table", env)
        assert cells[1:5] == [
            f"{mean_of([o for o in before if env_of(o) == env]):.3f}",
            f"{mean_of([o for o in after if env_of(o) == env]):.3f}",
            f"{mean:+.3f}", f"[{low:+.3f}, {high:+.3f}]",
        ]  # fmt: skip
    assert reader.row("#held-out table", "sudoku")[5] == f"{p_sudoku:.3f}"
    assert expected["sudoku"][1] > 0 >= expected["workplace"][1], "one is clear, the other is not"
    reader.click("compare the first evaluation")
    cells = reader.row("main section:nth-of-type(1) table", "sudoku")
    mean, low, high, _ = expected["sudoku"]
    assert cells[5:8] == [f"{mean:+.3f}", f"[{low:+.3f}, {high:+.3f}]", f"{p_sudoku:.3f}"]


def test_2_why_did_the_reward_drop_at_a_step(reader, runs):
    steps = runs[0].of("step")
    usual = median(mean_of([o for o in steps[s] if env_of(o) == "workplace"]) for s in range(DROP - 10, DROP))
    low = fmean(mean_of([o for o in steps[s] if env_of(o) == "workplace"]) for s in range(DROP, DROP + 3))
    assert f"workplace: reward dropped from {usual:.3f} to {low:.3f} at step {DROP}" in reader.text()
    shown = reader.series("reward", "each step", 1)
    assert shown[DROP] == pytest.approx(
        mean_of([o for o in steps[DROP] if env_of(o) == "workplace"]), abs=1e-3
    )
    reader.click("Steps")
    reader.click(f"step {DROP}")
    reader.click("change")
    changes = {}
    for group in runs[0].groups(DROP):
        earlier = [
            of for step in range(DROP - 1, 0, -1) for of in runs[0].groups(step)
            if key_of(of[0]) == key_of(group[0])
        ]  # fmt: skip
        if earlier:
            changes[key_of(group[0])] = mean_of(group) - mean_of(earlier[0])
    worst = min(changes, key=lambda key: changes[key])
    first = reader.rows("main")[0]
    assert first[1] == worst and first[8] == f"{changes[worst]:+.3f}" and changes[worst] <= -0.5
    reader.click(worst)
    assert f"step-{DROP:06d}" in reader.text()


def test_3_which_tasks_were_never_solved(reader, runs):
    solved: dict[str, list[bool]] = defaultdict(list)
    for outcomes in runs[0].of("step").values():
        for outcome in outcomes:
            if reward_of(outcome) is not None:
                solved[key_of(outcome)].append(reward_of(outcome) == 1)
    never = sorted(key for key, of in solved.items() if not any(of))
    assert never == ["workplace/train/3"]
    reader.click("Tasks")
    reader.click("train")
    wait_for(reader.driver, "document.documentElement.dataset.drawn")
    names = reader.driver.execute_script("return document.querySelectorAll('.chart')[1].data[0].y")
    shares = {key: fmean(of) for key, of in solved.items() if key.startswith("workplace")}
    order = sorted(shares, key=lambda key: (-shares[key], key))
    assert names == [f"{len(order) - at}. {key}" for at, key in enumerate(order[::-1])]
    # A click on a cell opens the task's group at that step: the lowest row, the last column.
    plot = reader.driver.find_elements("css selector", ".chart .nsewdrag")[1]
    from selenium import webdriver

    right, down = plot.size["width"] / 2 - 6, plot.size["height"] / 2 - 6
    actions = webdriver.ActionChains(reader.driver)
    actions.move_to_element_with_offset(plot, right, down).pause(0.3).click().perform()
    number = [key_of(group[0]) for group in runs[0].groups(STEPS)].index(never[0])
    wait_for(reader.driver, f"location.pathname.endsWith('/group/step-{STEPS:06d}/{number}')", 10)
    assert reader.text("h1").strip("◀▶ ") == never[0]
    reader.click("Tasks")
    reader.click("train")
    reader.click(f"{len(never)} never solved")
    assert [row[0] for row in reader.rows("main .scroll")] == never


def test_4_is_it_hacking_the_reward(reader, runs):
    groups = [group for group in runs[0].groups(STEPS) if env_of(group[0]) == "workplace"]
    distinct = fmean(len({last_words(o) for o in group}) / GROUP for group in groups)
    assert reader.series("hacking", "workplace", 1)[STEPS] == pytest.approx(distinct, abs=1e-3)
    reader.click("Rollouts")
    reader.click("reward")
    reader.click("reward")
    file, number = reader.driver.execute_script(
        "return document.querySelector('tr.row a.go').pathname.split('/').slice(-2)"
    )
    best = runs[0].files[file][int(number)]
    highest = max(reward_of(o) or 0 for of in runs[0].files.values() for o in of if "rollout" in o)
    assert reward_of(best) == highest == 1
    reader.click(number, "//tr[contains(@class, 'row')]")
    verdict = reader.text("aside")
    for name, value in best["rollout"]["verdict"].items():
        shown = value if isinstance(value, str) else json.dumps(value)
        assert f"{name}\n{shown}" in verdict


def kind_of(group: list[Outcome]) -> str:
    rewards = {reward for o in group if (reward := reward_of(o)) is not None}
    return "mixed" if len(rewards) > 1 else "all solved" if rewards == {1.0} else "none solved"


def test_5_why_is_there_no_gradient(reader, runs):
    groups = runs[0].groups(STEPS)
    of_env = [kind_of(group) for group in groups if env_of(group[0]) == "workplace"]
    shown = reader.series("groups", "none solved", 1)[STEPS]
    assert shown == pytest.approx(of_env.count("none solved") / len(of_env), abs=1e-3) and shown > 0
    reader.click("Steps")
    reader.click(f"step {STEPS}")
    kinds = Counter(kind_of(group) for group in groups)
    for kind in ("mixed", "all solved", "none solved"):
        assert f"{kinds[kind]} {kind}" in reader.text()
    reader.click(f"{kinds['none solved']} none solved")
    flat = [key_of(group[0]) for group in groups if kind_of(group) == "none solved"]
    assert [row[1] for row in reader.rows("main")] == flat
    advantages = [line["advantage"] for line in runs[0].files[f"step-{STEPS:06d}.train"]]
    reader.click(flat[0])
    number = next(n for n, o in enumerate(runs[0].of("step")[STEPS]) if key_of(o) == flat[0])
    assert {row[4] for row in reader.rows("main .card")} == {f"{advantages[number]:+.3f}"} == {"+0.000"}


def test_6_which_environment_slows_the_step_and_is_it_the_policy_or_the_environment(reader, runs):
    last = [runs[0].steps[step] for step in range(STEPS - 9, STEPS + 1)]
    share = sum(e["time/rollout"] for e in last) / sum(e["time/step"] for e in last)
    assert reader.series("seconds", "rollout")[STEPS] == last[-1]["time/rollout"]
    outcomes = [o for s in range(STEPS - 9, STEPS + 1) for o in runs[0].of("step")[s] if "rollout" in o]
    ends = {env: max(o["rollout"]["seconds"]["total"] for o in outcomes if env_of(o) == env) for env in
            ("sudoku", "workplace")}  # fmt: skip
    slow = max(ends, key=lambda env: ends[env])
    seconds = [o["rollout"]["seconds"] for o in outcomes if env_of(o) == slow]
    policy = sum(s["policy"] for s in seconds) / sum(s["total"] for s in seconds)
    finding = next(text for text in reader.text("ul.findings").splitlines() if "Bottleneck" in text)
    assert f"rollouts are {share:.0%} of a step" in finding and f"{slow} ends last most often" in finding
    assert f"{1 - policy:.0%} of its rollouts' time is the environment, not the policy" in finding
    reader.click("Rollouts")
    for _ in range(2):
        reader.open(reader.driver.find_element("link text", "s"))
    file, number = reader.driver.execute_script(
        "return document.querySelector('tr.row a.go').pathname.split('/').slice(-2)"
    )
    reader.click(number, "//tr[contains(@class, 'row')]")
    of_one = runs[0].files[file][int(number)]["rollout"]
    assert of_one["task"]["key"].startswith(slow)
    total, policy, queue = (of_one["seconds"][name] for name in ("total", "policy", "queue"))
    assert f"{total:.1f} s (policy {policy:.1f}, queue {queue:.1f})" in reader.text(".facts")


def test_7_is_training_on_policy_and_exact(reader, runs):
    entry = runs[0].steps[STEPS]
    shown = reader.series("ratio", "max")[STEPS]
    assert shown == pytest.approx(entry["sampling/ratio_max"], rel=1e-3)
    drift = reader.driver.execute_script(
        "return [...document.querySelectorAll('#ratio .chart')].flatMap((c) => c.data)"
        ".filter((d) => d.name === 'workplace').map((d) => d.y[d.y.length - 1])"
    )
    assert drift == [pytest.approx(entry["workplace/drift"], rel=1e-3)]
    reader.click("Steps")
    reader.click(f"step {STEPS}")
    reader.open(reader.find("tr.row .sq"))
    reader.click("Tokens")
    reader.click("ratio trainer / engine")
    rollout = runs[0].of("step")[STEPS][0]["rollout"]
    trained = runs[0].files[f"step-{STEPS:06d}.train"][0]["logprobs"]
    from selenium import webdriver

    tokens = reader.driver.find_elements("css selector", "#tokens .y")
    assert len(tokens) == len(trained) == 3
    for token, engine, trainer in zip(tokens, rollout["turns"][0]["logprobs"], trained, strict=True):
        webdriver.ActionChains(reader.driver).move_to_element(token).perform()
        wait_for(reader.driver, "!document.getElementById('hover').hidden", 5)
        lines = dict(line.rsplit(" ", 1) for line in reader.text("#hover").splitlines() if "ratio" in line)
        assert float(lines["ratio"]) == pytest.approx(math.exp(trainer - engine), abs=2e-4)


def test_8_is_exploration_collapsing(reader, runs):
    shown = reader.series("entropy", "entropy (TRL)")
    assert shown == {step: pytest.approx(entry["entropy"], rel=1e-3) for step, entry in runs[0].steps.items()}
    outcomes = [o for o in runs[0].of("step")[STEPS] if env_of(o) == "sudoku"]
    logprobs = [p for o in outcomes for turn in o["rollout"]["turns"] for p in turn["logprobs"]]
    assert reader.series("entropy", "sudoku")[STEPS] == pytest.approx(-fmean(logprobs), rel=1e-3)
    reader.click("Steps")
    reader.click(f"step {STEPS}")
    groups = runs[0].groups(STEPS)
    for row, group in zip(reader.rows("main"), groups, strict=True):
        words = Counter(last_words(o) for o in group)
        [(_, most)] = words.most_common(1)
        assert row[10].startswith(f"{len(words)}: {most} × ")
    reader.click(key_of(groups[0][0]))
    ranked = sorted(groups[0], key=lambda o: -(reward_of(o) or 0))
    sides = reader.text(".sides")
    assert last_words(ranked[0]) in sides or "are the same" in reader.text()


def test_9_what_fails_and_where_is_the_log(reader, runs):
    failed = [
        (step, number, o) for step, of in runs[0].of("step").items() for number, o in enumerate(of)
        if o["outcome"] == "failed"
    ]  # fmt: skip
    [(step, number, outcome)] = failed
    cells = [row for row in reader.rows("main section:nth-of-type(2)") if row[1].startswith("failed")]
    assert cells == [["workplace", f"failed ({outcome['cause']})", "train", "1"]]
    reader.click("failed (timeout)")
    [row] = reader.rows("main .scroll")
    assert row[:3] == [str(step), str(number), key_of(outcome)]
    reader.click(str(number), "//tr[contains(@class, 'row')]")
    assert outcome["detail"] in reader.text()
    reader.click(outcome["log"])
    assert (runs[0].path / outcome["log"]).read_text().splitlines()[-1] in reader.text()


def test_10_do_rollouts_get_cut_off(reader, runs):
    cut = [
        (step, number, o) for step, of in runs[0].of("step").items() for number, o in enumerate(of)
        if o["outcome"] == "truncated"
    ]  # fmt: skip
    [(step, number, outcome)] = cut
    shown = reader.series("endings", "truncated length", 0)
    num = sum(env_of(o) == "workplace" for o in runs[0].of("step")[step])
    assert shown[step] == pytest.approx(1 / num, abs=1e-3)
    reader.click(f"truncated ({outcome['limit']})")
    [row] = reader.rows("main .scroll")
    assert row[:3] == [str(step), str(number), key_of(outcome)]
    reader.click(str(number), "//tr[contains(@class, 'row')]")
    messages = reader.driver.find_elements("css selector", ".message .text")
    assert messages[-1].text == last_words(outcome)


def test_11_what_differs_between_two_runs_and_is_the_gap_real(reader, runs):
    from selenium.webdriver.support.ui import Select

    reader.click("Compare")
    choice = Select(reader.find("select[name=with]"))
    choice.select_by_visible_text(next(o.text for o in choice.options if o.text.endswith("seed1")))
    reader.open(reader.find("main form button"))
    wait_for(reader.driver, "location.search.includes('with=')")
    assert reader.rows("main section:nth-of-type(2)") == [["seed", "0", "1"]]
    last = [run.of("eval")[STEPS] for run in runs]
    mean, low, high, p = paired(last[0], last[1], "sudoku")
    cells = reader.row("main section:nth-of-type(1) table", "sudoku")
    assert cells[5:8] == [f"{mean:+.3f}", f"[{low:+.3f}, {high:+.3f}]", f"{min(1.0, 2 * p):.3f}"]
    rewards = [{key_of(o): reward_of(o) for o in of} for of in last]
    differing = sorted(key for key in rewards[0] if rewards[0][key] != rewards[1][key])
    assert [row[0] for row in reader.rows("main section:nth-of-type(3)")] == differing and differing
    reader.click("side by side", "//tr[contains(@class, 'row')]")
    answers = [next(last_words(o) for o in of if key_of(o) == differing[0]) for of in last]
    text = reader.text()
    assert all(answer in text for answer in answers) and f"reward {rewards[0][differing[0]]:.3f}" in text


def test_12_what_exactly_was_trained_on_in_a_rollout_and_why_this_reward(reader, runs):
    step, number = STEPS, next(
        n for n, o in enumerate(runs[0].of("step")[STEPS]) if env_of(o) == "workplace"
    )  # fmt: skip
    reader.click("Steps")
    reader.click(f"step {step}")
    reader.open(reader.find(f"a.sq[href$='/{number}']"))
    rollout = runs[0].of("step")[step][number]["rollout"]
    trained = runs[0].files[f"step-{step:06d}.train"][number]
    assert f"advantage {trained['advantage']:+.3f}" in reader.text(".facts")
    assert f"reward {rollout['reward']:.3f}" in reader.text(".facts")
    assert f"calls_matched\n{rollout['verdict']['calls_matched']}" in reader.text("aside")
    reader.click("Tokens")
    reader.click("trained or masked")
    ids = lambda css: reader.driver.execute_script(  # noqa: E731
        f"return [...document.querySelectorAll('{css}')].flatMap((t) => t.dataset.t.split(';')[0].split(' '))"
    )
    sampled = [i for turn in rollout["turns"] for i in turn["completion_ids"]]
    first, second = rollout["turns"]
    answered = second["prompt_ids"][len(first["prompt_ids"]) + len(first["completion_ids"]) :]
    assert ids("#tokens .y") == list(map(str, sampled)) and trained["trained"] == len(sampled)
    assert ids("#tokens .m") == list(map(str, answered)), "what the environment wrote is masked"
