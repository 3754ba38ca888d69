"""Each rule finds what is past its threshold, and nothing that is just before it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product

import pytest
from made_runs import make_run, write_lines

from gymexp.report import findings
from gymexp.report.bottleneck import PHASES, Bottleneck, Setup, find_bottleneck, sentence, tail_seconds
from gymexp.report.held_out import HeldOut
from gymexp.report.run_panels import defaults
from gymexp.report.run_records import read_records
from gymexp.statistics import paired_change


def ramp(first: float, last: float, each: int = 10) -> list[float]:
    return [first] * each + [last] * each


def test_flat_groups_need_more_than_half_in_each_of_ten_steps():
    kinds = {"mixed": [0.4] * 10, "all_solved": [0.1] * 10, "none_solved": [0.5] * 10}
    found = findings.flat_groups([0.6] * 10, kinds)
    assert found and "60% of the groups" in found.text and "none solved" in found.text
    assert findings.flat_groups([0.6] * 9 + [0.5], kinds) is None
    assert findings.flat_groups([0.6] * 9, kinds) is None


def test_the_gap_of_training_and_held_out_has_to_grow_by_more_than_a_tenth():
    found = findings.gap_growth("sudoku", ramp(0.2, 0.6), [(0, 0.2), (20, 0.25)])
    assert found and "+0.400" in found.text and "+0.050" in found.text
    assert findings.gap_growth("sudoku", ramp(0.2, 0.6), [(0, 0.2), (20, 0.51)]) is None
    assert findings.gap_growth("sudoku", ramp(0.2, 0.6), [(0, 0.2)]) is None


def test_entropy_has_to_fall_below_a_fifth_while_the_reward_is_flat():
    assert findings.entropy_fall(ramp(1.0, 0.19), [0.5] * 20)
    assert findings.entropy_fall(ramp(1.0, 0.21), [0.5] * 20) is None
    assert findings.entropy_fall(ramp(1.0, 0.19), [0.5] * 15 + [0.6] * 5) is None


def test_length_has_to_grow_by_half_without_success():
    assert findings.length_growth("e", ramp(100, 150), ramp(0.5, 0.51))
    assert findings.length_growth("e", ramp(100, 149), ramp(0.5, 0.51)) is None
    assert findings.length_growth("e", ramp(100, 150), ramp(0.5, 0.53)) is None


@pytest.mark.parametrize(
    ("rule", "above", "at"),
    [
        (lambda values: findings.truncations("e", values), 0.11, 0.1),
        (lambda values: findings.failures("e", values, {"timeout": values}), 0.021, 0.02),
        (lambda values: findings.high_drift(values, 0.02), 0.0101, 0.01),
        (findings.clipping, 0.21, 0.2),
    ],
)
def test_a_share_has_to_be_above_its_threshold(rule, above, at):
    assert rule([above] * 10)
    assert rule([at] * 10) is None
    assert rule([]) is None and rule([None] * 10) is None


def test_one_step_far_from_what_sampled_it_is_enough():
    found = findings.far_from_samples([0.999] * 5 + [0.674] + [0.999] * 4)
    assert found and "67%" in found.text and found.panel == "ratio"
    assert findings.far_from_samples([0.674] + [0.999] * 10) is None, "more than ten steps ago"
    assert findings.far_from_samples([0.8] * 10) is None
    assert findings.far_from_samples([None]) is None


def test_failures_name_their_commonest_cause():
    found = findings.failures("e", [0.1], {"timeout": [0.02], "engine": [0.08]})
    assert found and "10.0%" in found.text and "engine" in found.text and "timeout" not in found.text


def test_failures_name_the_commonest_reason_whatever_its_numbers_are():
    texts = ["a:41 answered 500: boom", "no answer", "a:42 answered 500: boom", "b" * 500]
    rows = [{"outcome": "failed", "text": text} for text in texts]
    rows += [{"outcome": "completed", "text": "fine"}] * 9
    reason = findings.reason_of_failures(rows)
    assert reason == "a:41 answered 500: boom" and findings.reason_of_failures(rows[4:]) == ""
    found = findings.failures("e", [0.1], {"environment": [0.1]}, reason)
    assert found and found.text.endswith("most by environment (a:41 answered 500: boom).")
    assert len(findings.reason_of_failures(rows[3:])) == 200


def test_one_environment_has_to_fall_while_the_mean_rises():
    found = findings.one_falls({"a": ramp(0.5, 0.44), "b": ramp(0.2, 0.4)})
    assert found and found.text.startswith("a gets worse")
    assert findings.one_falls({"a": ramp(0.5, 0.46), "b": ramp(0.2, 0.4)}) is None
    assert findings.one_falls({"a": ramp(0.5, 0.44), "b": ramp(0.2, 0.29)}) is None
    assert findings.one_falls({"a": ramp(0.5, 0.44)}) is None


def test_slower_steps_name_the_part_that_grew():
    parts = {"rollout": [9.0, *ramp(6, 9.1)], "update": [2.0, *ramp(2, 2.1)]}
    found = findings.slower_steps([20.0, *ramp(10, 13)], parts)
    assert found and "13.0 s" in found.text and "rollout (+3.1 s)" in found.text
    assert findings.slower_steps([20.0, *ramp(10, 12.9)], parts) is None
    assert findings.slower_steps(ramp(10, 13), parts) is None, "the first step warms up"


NOISY = [0.8, 0.78, 0.82, 0.79, 0.81, 0.8, 0.77, 0.83, 0.8, 0.8, 0.8]


def test_a_drop_is_three_robust_deviations_below_what_was_usual():
    found = findings.largest_drop({"sudoku": [*NOISY, 0.5, 0.52, 0.5], "other": [0.5] * 14})
    assert found and (found.env, found.place, found.usual) == ("sudoku", 11, 0.8)
    assert found.low == pytest.approx(0.52, abs=0.02)
    assert findings.largest_drop({"sudoku": [*NOISY, 0.77, 0.78, 0.77]}) is None
    assert findings.largest_drop({"sudoku": [*NOISY, 0.5, 0.8, 0.8]}) is not None
    assert findings.largest_drop({"sudoku": NOISY}) is None


def test_what_changed_with_a_drop_moved_by_three_deviations_and_a_tenth():
    series = {
        "tokens": [30, 31, 29] * 3 + [30] + [61] * 3,
        "entropy": [0.5] * 10 + [0.54] * 3,
        "failed": [None] * 13,
    }
    assert findings.moved_with(10, series) == ["tokens 30 → 61"]
    assert findings.moved_with(9, series) == [], "nine steps before are too few"


def test_the_tasks_that_fell_most_are_those_that_were_played_before():
    def played(**rewards: float) -> list[dict]:
        return [{"env": "e", "key": key, "reward": reward} for key, reward in rewards.items()]

    by_step = {
        1: played(a=1.0, b=0.5, c=1.0, d=0.0),
        3: played(a=0.25, b=0.25, new=0.0),
        5: played(c=0.0, d=1.0),
    }
    assert findings.fallen_tasks(by_step, "e", 3) == ["c 1.00 → 0.00", "a 1.00 → 0.25"]
    assert findings.fallen_tasks(by_step, "e", 1) == []


def test_a_drop_is_told_with_what_changed_and_the_tasks(tmp_path):
    run = make_run(tmp_path / "run", steps=20)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "loss" in line:
            low = line["step"] >= 16
            line |= {
                "sudoku/reward": 0.1 if low else 0.8,
                "sudoku/tokens": 60 if low else 30,
                "sudoku/nll": 0.4,
            }
    write_lines(run / "metrics.jsonl", lines)
    [found] = [one.text for one in findings.find(read_records(run)) if "dropped" in one.text]
    assert found.startswith("sudoku: reward dropped from 0.800 to 0.100 at step 16; with it tokens 30 → 60")


def test_the_held_out_change_is_good_only_with_an_interval_above_0():
    before = {str(i): 0.0 for i in range(20)}
    clear = paired_change(before, {key: 1.0 if int(key) < 15 else 0.0 for key in before})
    unclear = paired_change(before, {key: 1.0 if key == "0" else 0.0 for key in before})
    good = findings.held_out_change({"e": HeldOut(0.0, 0.75, change=clear, p=0.001)})
    assert (
        good
        and good.mark == "good"
        and "0.000 → 0.750" in good.text
        and "no more than noise" not in good.text
    )
    poor = findings.held_out_change({"e": HeldOut(0.0, 0.05, change=unclear, p=1.0)})
    assert poor and poor.mark == "fact" and "no more than noise" in poor.text
    assert findings.held_out_change({}) is None


def rows(ends: list[float], env: str = "slow", policy: float = 0.0, queue: float = 0.0) -> list[dict]:
    seconds = [{"total": end, "policy": policy * end, "queue": queue} for end in ends]
    return [{"env": env, "began": 1000.0, "seconds": one} for one in seconds]


def step(number: int, **seconds: float) -> dict:
    whole = {"step": number, "time/step": sum(seconds.values())}
    return whole | {f"time/{phase}": value for phase, value in seconds.items()}


def test_the_tail_begins_when_fewer_than_a_quarter_play():
    assert tail_seconds(rows([1, 2, 3, 4, 5, 6, 7, 8])) == pytest.approx(2), "after six of eight ended"
    assert tail_seconds(rows([1, 1, 1, 9])) == pytest.approx(8)
    assert tail_seconds(rows([1, 2, 3])) is None


def test_the_largest_phase_is_the_bottleneck():
    found = find_bottleneck([step(2, rollout=2, update=7, other=1)], {})
    assert found and found == Bottleneck("update", 0.7, step=10)
    assert "train_gpus" in sentence(found, Setup(True, True, {}))
    assert find_bottleneck([], {}) is None


@pytest.mark.parametrize(
    ("played", "cause", "remedy"),
    [
        (rows([1, 1, 1, 1, 1, 1, 1, 9]), "tail", "env.slow.max_output_tokens"),
        (rows([2] * 8, queue=8), "queue", "env.slow.max_concurrency"),
        (rows([9] * 8, policy=0.2), "environment", "env.slow.replicas (now 3)"),
        (rows([9] * 8, policy=0.8), "policy", "placement.rollout_gpus"),
    ],
)
def test_slow_rollouts_have_a_cause_and_a_remedy(played, cause, remedy):
    fast = rows([0.5] * 8, env="fast")
    found = find_bottleneck([step(2, rollout=9, update=1)], {2: [*fast, *played]})
    assert found and (found.phase, found.env, found.cause) == ("rollout", "slow", cause)
    assert (found.step, found.exponent) == (10, None)
    assert remedy in sentence(found, Setup(False, True, {"slow": 3}))


def test_gpus_that_wait_should_overlap_and_the_sentence_says_what_it_gives():
    latency = Bottleneck("rollout", 0.75, "e", "policy", 0.9, step=40, exponent=0.0)
    text = sentence(latency, Setup(True, True, {}))
    # 40 s: a batch is 30 s, the rest 10. With a lead of 3 a batch has all four steps but for 10 s.
    assert "decode latency" in text and "overlap.max_staleness=4 overlap.lead=3" in text
    assert "about 10.0 s instead of 40.0 s" in text
    throughput = sentence(replace(latency, exponent=1.0), Setup(True, True, {}))
    assert "throughput" in throughput and "overlap.lead=1), a step takes about 30.0 s" in throughput
    unknown = sentence(replace(latency, exponent=None), Setup(True, True, {}))
    assert "pace" not in unknown and "about 10.0 to 30.0 s" in unknown
    tail = sentence(replace(latency, cause="tail"), Setup(True, True, {}))
    assert "overlap.lead=3" in tail
    assert "overlap" not in sentence(latency, Setup(False, True, {})), "the GPU trains meanwhile"
    assert "A GPU" in sentence(latency, Setup(False, False, {}))


def test_a_run_that_overlaps_gets_what_is_left_to_change():
    found = Bottleneck("rollout", 0.25, "e", "policy", 0.9, step=40, exponent=0.1)
    ahead = Setup(True, True, {}, max_staleness=4, lead=1)
    assert "overlap.lead (now 1), within overlap.max_staleness (now 4)" in sentence(found, ahead)
    assert "30.0 s besides" in sentence(found, ahead)
    assert "rollout_gpus" in sentence(replace(found, exponent=0.9), ahead)
    update = Bottleneck("update", 0.6, step=40)
    assert "model.packing=tree" in sentence(update, ahead)
    assert "model.packing" not in sentence(update, replace(ahead, packing="tree"))
    scored = Bottleneck("logprobs", 0.6)
    assert "rollout.correction=behavior" in sentence(scored, replace(ahead, correction="decoupled"))
    assert "rollout.correction" not in sentence(scored, ahead)


def test_a_remedy_names_keys_that_exist():
    """Of every cause with every setup, against the schema."""
    found = [
        Bottleneck("rollout", 0.6, "e", cause, 0.9, step=9, exponent=exponent)
        for exponent in (None, 0.1, 0.9)
        for cause in ("tail", "queue", "policy", "environment", "")
    ]
    found += [Bottleneck(phase, 0.6) for phase in PHASES]
    setups = [
        Setup(apart, gpus, {"e": 1}, staleness, correction=correction)
        for apart, gpus in product((False, True), repeat=2)
        for staleness in (0, 4)
        for correction in ("auto", "decoupled")
    ]
    known = defaults({"env": {"e": {}}})
    named = {
        key
        for one in found
        for setup in setups
        for key in re.findall(r"[a-z]+(?:\.[a-z_]+)+", sentence(one, setup))
    }
    keys = named - {"trainer.log"}
    assert len(keys) > 7 and keys <= known.keys(), keys - known.keys()


def test_a_run_has_at_most_six_findings_and_each_leads_to_a_panel(tmp_path):
    from gymexp.report.page import PANELS

    records = read_records(make_run(tmp_path / "run"))
    found = findings.find(records)
    assert 2 <= len(found) <= 6
    assert {one.panel for one in found} <= {build(records).id for build in PANELS}
    assert sum("Bottleneck" in one.text for one in found) == 1
