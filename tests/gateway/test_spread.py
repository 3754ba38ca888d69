"""Several gateways send a prompt to the same engine without a word between them, and none is overloaded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gymexp.gateway.spread import engine_for

URLS = [f"http://10.0.0.{number}:8000" for number in range(5)]
prompts = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
loads = st.dictionaries(st.sampled_from(URLS), st.integers(0, 50), min_size=1)


@given(prompts, loads)
def test_no_engine_gets_a_request_that_already_has_a_tenth_more_than_the_mean_with_it(prompt, in_flight):
    chosen = engine_for(prompt, in_flight)
    mean = (sum(in_flight.values()) + 1) / len(in_flight)
    assert in_flight[chosen] < 1.1 * mean


@given(prompts, st.permutations(URLS))
def test_gateways_that_list_the_engines_in_another_order_choose_the_same_one(prompt, order):
    assert engine_for(prompt, dict.fromkeys(order, 0)) == engine_for(prompt, dict.fromkeys(URLS, 0))


@given(prompts, st.sampled_from(URLS))
def test_an_engine_that_goes_away_changes_the_place_of_its_own_prompts_alone(prompt, gone):
    before = engine_for(prompt, dict.fromkeys(URLS, 0))
    after = engine_for(prompt, {url: 0 for url in URLS if url != gone})
    assert after == before or before == gone


@given(prompts)
def test_a_group_stays_together_while_its_engine_is_not_too_busy(prompt):
    in_flight = dict.fromkeys(URLS, 10)
    first = engine_for(prompt, in_flight)
    in_flight[first] += 1
    assert engine_for(prompt, in_flight) == first


def test_prompts_are_spread_evenly_over_engines_that_have_no_requests():
    chosen = [engine_for([number, 7], dict.fromkeys(URLS, 0)) for number in range(2000)]
    assert all(300 < chosen.count(url) < 500 for url in URLS)
