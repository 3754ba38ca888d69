"""Simulates how several gateways spread the rollouts of groups over engines, by two rules.

    python benchmarks/spread.py

"prompt": `gymexp.gateway.spread`, as in a run. "least busy": the engine with the fewest requests that the
gateway itself has in flight, as with a single gateway. A group's rollouts arrive at once, each at a random
gateway, whenever there is room for one more. They last as long as a log-normal number says (sigma 0.8). No
process is started, and the result is the same every time. For each rule it prints how much the busiest engine
is above the mean of all (mean over time), and at how many engines a group's prompt is computed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from statistics import mean

from gymexp.gateway.spread import engine_for

GROUP, NUM_GROUPS, WARM_UP, SIGMA = 8, 600, 50, 0.8
Rule = Callable[[list[int], dict[str, int]], str]  # returns the engine for a prompt, by a gateway's requests


def least_busy(prompt_ids: list[int], in_flight: dict[str, int]) -> str:
    return min(in_flight, key=in_flight.__getitem__)


def simulate(rule: Rule, gateways: int, engines: int, most_in_flight: int) -> tuple[float, float]:
    """Returns the busiest engine's requests divided by the mean, and the engines of a group."""
    draw = random.Random(0)
    urls = [f"http://engine-{number}" for number in range(engines)]
    loads = [dict.fromkeys(urls, 0) for _ in range(gateways)]
    ends: list[tuple[float, int, str]] = []
    now, imbalances, spreads = 0.0, [], []
    for group in range(NUM_GROUPS):
        chosen = set()
        for _ in range(GROUP):
            if len(ends) == most_in_flight:
                now, gateway, url = heapq.heappop(ends)
                loads[gateway][url] -= 1
            gateway = draw.randrange(gateways)
            url = rule([group, 7], loads[gateway])
            loads[gateway][url] += 1
            heapq.heappush(ends, (now + draw.lognormvariate(0, SIGMA), gateway, url))
            chosen.add(url)
        if group >= WARM_UP:
            spreads.append(len(chosen))
            of_each = [sum(of_gateway[url] for of_gateway in loads) for url in urls]
            imbalances.append(max(of_each) / mean(of_each))
    return mean(imbalances), mean(spreads)


def main() -> None:
    for sizes in ((2, 2, 64), (4, 4, 128), (4, 4, 512), (4, 16, 512), (4, 16, 2048)):
        print("{} gateways, {} engines, {} rollouts in flight:".format(*sizes))
        for name, rule in (("prompt", engine_for), ("least busy", least_busy)):
            imbalance, engines = simulate(rule, *sizes)
            print(
                f"  {name:10}  busiest {imbalance:.2f} of the mean, prompt computed at {engines:.2f} engines"
            )


if __name__ == "__main__":
    main()
