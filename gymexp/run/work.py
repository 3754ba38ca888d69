"""What the controller's processes are for: a training run, or an evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """process: the name of the process that does the work, and of its log. module: its module, which gets the
    directory and `arguments`. sends_weights: whether it sends weights to engine servers, which get no
    requests before. text_policy: arguments of the text gateway, for a policy that gives no token ids; empty:
    engines. saving: what it does when it is asked to end. stopped_after: how far it came then, with fields of
    result.json.
    """

    process: str
    module: str
    arguments: tuple[str, ...] = ()
    sends_weights: bool = True
    text_policy: tuple[str, ...] = ()
    saving: str = "saving a checkpoint"
    stopped_after: str = "after step {step}"


TRAINING = Work("trainer", "gymexp.training.trainer_process")


def evaluation(numbers: list[int], text_policy: tuple[str, ...] = ()) -> Work:
    """Returns the work of an evaluation. numbers: the policies of its plan to play in one start."""
    return Work(
        process="evaluator",
        module="gymexp.evaluation.evaluator_process",
        arguments=(",".join(map(str, numbers)),),
        sends_weights=False,
        text_policy=text_policy,
        saving="keeping what has been scored",
        stopped_after="before it was done",
    )
