"""Names what a step waits for most, and what would mend it. Pure functions with their thresholds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from gymexp.report.pace import load_exponent, step_with_lead

Row = Mapping[str, Any]
PHASES = ("rollout", "sync", "logprobs", "update", "evaluation", "other")
LAST_STEPS = 10
TAIL_IN_FLIGHT = 0.25  # a step is in its tail while fewer than this share of its rollouts still play
LONG_TAIL = 0.35  # of the rollout phase
LONG_QUEUE = 0.35  # of a rollout's time from the start of the collection to its end
LATENCY = 0.5  # The exponent below which decode latency holds the rollouts back, and else throughput.
MAX_LEAD = 4
WORTH = 0.9  # A longer lead must give at most this share of a step's seconds.


@dataclass(frozen=True)
class Setup:
    """What of the configuration decides a remedy. gpus_apart: whether some GPUs only train, and others only
    sample. has_gpus: whether the run samples on GPUs. replicas: by environment. max_staleness, lead: of
    `overlap`. packing: of the model. correction: of the rollouts."""

    gpus_apart: bool
    has_gpus: bool
    replicas: Mapping[str, int]
    max_staleness: int = 0
    lead: int = 1
    packing: str = "none"
    correction: str = "auto"

    @property
    def may_overlap(self) -> bool:
        """Whether rollouts can be played while the trainer trains, on GPUs of their own, and are not yet."""
        return self.gpus_apart and not self.max_staleness


@dataclass(frozen=True)
class Bottleneck:
    """phase: the one that takes most of a step. share: of the step's seconds. env: the environment whose last
    rollout ends last most often; "" if the phase is another. cause: tail, queue, policy or environment.
    cause_share: of the rollout phase (tail), or of the rollouts' seconds. seconds: of the tail, else 0.
    step: seconds of a step. exponent: of `pace.load_exponent`; None if it cannot be told."""

    phase: str
    share: float
    env: str = ""
    cause: str = ""
    cause_share: float = 0.0
    seconds: float = 0.0
    step: float = math.nan
    exponent: float | None = None


def tail_seconds(rows: Sequence[Row]) -> float | None:
    """Returns the seconds at the end of a step's rollouts in which less than a quarter of them still play;
    None with fewer than four that have a time."""
    ends = sorted(row["began"] + row["seconds"]["total"] for row in rows if _has_times(row))
    if len(ends) < 4:
        return None
    # While more than this many have ended, fewer than a quarter are left.
    in_tail_after = len(ends) - int(len(ends) * TAIL_IN_FLIGHT)
    return ends[-1] - ends[in_tail_after - 1]


def _has_times(row: Row) -> bool:
    return bool(row.get("began")) and "total" in (row.get("seconds") or {})


def find_bottleneck(
    steps: Sequence[Mapping[str, Any]], rows_of_step: Mapping[int, Sequence[Row]]
) -> Bottleneck | None:
    """Returns the bottleneck of the last ten steps; None before the first step.

    steps: entries of metrics.jsonl. rows_of_step: the index's lines of training rollouts. The first step,
    which compiles and warms up, counts only if it is the only one.
    """
    last = [entry for entry in steps if entry.get("time/step")][-LAST_STEPS:]
    last = last[1:] if len(last) > 1 and last[0]["step"] == 1 else last
    whole = sum(entry["time/step"] for entry in last)
    if not whole:
        return None
    seconds = {phase: sum(entry.get(f"time/{phase}") or 0 for entry in last) for phase in PHASES}
    phase = max(seconds, key=lambda name: seconds[name])
    share, step = seconds[phase] / whole, whole / len(last)
    rows = {entry["step"]: rows_of_step.get(entry["step"], ()) for entry in last}
    rows = {step: [row for row in of if _has_times(row)] for step, of in rows.items()}
    if phase != "rollout" or not any(rows.values()):
        return Bottleneck(phase, share, step=step)
    found = _of_rollouts(share, seconds["rollout"], [of for of in rows.values() if of])
    exponent = load_exponent([row for of in rows.values() for row in of])
    return replace(found, step=step, exponent=exponent)


def _of_rollouts(share: float, rollout_seconds: float, steps: Sequence[Sequence[Row]]) -> Bottleneck:
    ended_last = Counter(max(rows, key=_end)["env"] for rows in steps)
    env = ended_last.most_common(1)[0][0]
    of_env = [row for rows in steps for row in rows if row["env"] == env]
    tails = [tail for rows in steps if (tail := tail_seconds(rows)) is not None]
    tail_share = min(1.0, sum(tails) / rollout_seconds) if rollout_seconds else 0.0
    total = sum(row["seconds"]["total"] for row in of_env)
    queue = sum(row["seconds"].get("queue", 0) for row in of_env)
    queue_share = queue / (queue + total) if queue + total else 0.0
    policy_share = min(1.0, sum(row["seconds"].get("policy", 0) for row in of_env) / total) if total else 0.0
    if tails and tail_share >= LONG_TAIL:
        return Bottleneck("rollout", share, env, "tail", tail_share, fmean(tails))
    if queue_share >= LONG_QUEUE:
        return Bottleneck("rollout", share, env, "queue", queue_share)
    if policy_share >= 0.5:
        return Bottleneck("rollout", share, env, "policy", policy_share)
    return Bottleneck("rollout", share, env, "environment", 1 - policy_share)


def _end(row: Row) -> float:
    return row["began"] + row["seconds"]["total"]


def sentence(found: Bottleneck, setup: Setup) -> str:
    """Returns the bottleneck as a sentence, with what would mend it."""
    head = (
        f"Bottleneck: {_NAMES.get(found.phase, found.phase)} {_verb(found.phase)} {found.share:.0%} of a step"
    )
    if found.phase != "rollout":
        return f"{head}. {_remedy_of_phase(found.phase, setup)}"
    parts = [head]
    if found.env:
        parts.append(f"{found.env} ends last most often")
    if found.cause == "tail":
        parts.append(
            f"{found.cause_share:.0%} of the rollouts' time is their tail ({found.seconds:.1f} s a step)"
        )
    elif found.cause == "queue":
        parts.append(f"its rollouts wait {found.cause_share:.0%} of their time for their turn")
    elif found.cause == "policy":
        parts.append(f"{found.cause_share:.0%} of its rollouts' time is the policy's sampling")
    elif found.cause:
        parts.append(f"{found.cause_share:.0%} of its rollouts' time is the environment, not the policy")
    if found.exponent is not None and found.cause in ("policy", "tail"):
        parts.append(_LIMITS[found.exponent < LATENCY].format(2**found.exponent))
    return f"{'; '.join(parts)}. {_remedy(found, setup)}"


_NAMES = {
    "rollout": "rollouts",
    "sync": "sending weights",
    "logprobs": "log-probabilities",
    "update": "the update",
}
_LIMITS = {
    True: "decode latency sets their pace (with twice as many in flight a token takes {:.1f} times as long)",
    False: "throughput sets their pace (with twice as many in flight a token takes {:.1f} times as long)",
}


def _verb(phase: str) -> str:
    return "are" if phase in ("rollout", "logprobs") else "is"


_REMEDIES = {
    "sync": "A faster way for the weights (engine.weights), or colocated engines, would mend it.",
    "logprobs": "More GPUs that train (placement.train_gpus) would mend it.",
    "update": "More GPUs that train (placement.train_gpus) would mend it.",
    "evaluation": "Fewer evaluations (evaluation.every_steps) or tasks (evaluation.num_tasks) would mend it.",
    "other": "trainer.log and the panel of events may say what it is.",
}


def _remedy_of_phase(phase: str, setup: Setup) -> str:
    if phase == "logprobs" and setup.correction == "decoupled":
        return "rollout.correction=behavior needs no pass for them."
    if phase == "update" and setup.packing == "none":
        return (
            "model.packing=tree computes the prompt of a task once for several rollouts; more GPUs that "
            "train (placement.train_gpus) would mend it too."
        )
    return _REMEDIES[phase]


def _remedy(found: Bottleneck, setup: Setup) -> str:
    env = found.env or "<name>"
    if found.cause == "queue":
        return f"A higher env.{env}.max_concurrency, or more env.{env}.replicas, would mend it."
    if found.cause == "environment":
        return f"More env.{env}.replicas (now {setup.replicas.get(env, 1)}) would mend it."
    if setup.may_overlap:
        return _overlap(found)
    if setup.max_staleness and (found.exponent is None or found.exponent < LATENCY):
        least = found.step * (1 - found.share)
        return (
            f"A longer overlap.lead (now {setup.lead}), within overlap.max_staleness (now "
            f"{setup.max_staleness}), has more of them in flight; a step needs {least:.1f} s besides them."
        )
    if found.cause == "tail":
        return f"env.{env}.max_output_tokens and env.{env}.max_steps bound the longest."
    if setup.has_gpus:
        return "More GPUs that sample (placement.rollout_gpus) would mend it."
    return "A GPU that samples, or a faster one, would mend it."


def _overlap(found: Bottleneck) -> str:
    """Returns which lead to try, and how long a step would then take: a range where it cannot be told whether
    latency or throughput decides."""
    batch, trainer = found.share * found.step, (1 - found.share) * found.step
    exponents = (0.0, 1.0) if found.exponent is None else (found.exponent,)

    def estimate(lead: int) -> list[float]:
        return [step_with_lead(batch, trainer, lead, exponent) for exponent in exponents]

    lead = 1
    while lead < MAX_LEAD and estimate(lead + 1)[0] <= WORTH * estimate(lead)[0]:
        lead += 1
    seconds = " to ".join(f"{one:.1f}" for one in estimate(lead))
    return (
        "If they are played while the trainer trains (overlap.max_staleness="
        f"{MAX_LEAD} overlap.lead={lead}), a step takes about {seconds} s instead of {found.step:.1f} s."
    )
