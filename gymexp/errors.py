"""The few exceptions that end a run. Each message names key, rule, value and fix."""


class GymexpError(Exception):
    """A run cannot start or go on, for a reason that the user can act on; printed without a traceback."""


class ConfigError(GymexpError):
    """The configuration breaks a rule. Raised before anything starts."""


class DataError(GymexpError):
    """A data file or row breaks a rule, or a source cannot be reached."""


class ServiceError(GymexpError):
    """A process of the run (server, gateway, trainer) could not start, died too often, or hangs."""


class NodeLost(ServiceError):
    """A node of the run is gone, with all that ran there."""


class RunDirectoryError(GymexpError):
    """The run directory is taken, or does not hold what a resumed run needs."""


class TokenMismatch(GymexpError):
    """Tokens of a rollout contradict each other: training on it would be wrong. Counted, never padded
    over."""


class RolloutError(GymexpError):
    """Too many rollouts failed for training to go on; names the server that failed and its log."""


class DriftError(GymexpError):
    """The engine's and the trainer's log-probabilities of the same tokens differ by more than the bound."""


class DrawError(GymexpError):
    """Sampled tokens depend on each other in a way that independent draws from the policy do not."""


class LaunchError(GymexpError):
    """Slurm did not take a job, or jobs that it took have failed; each is named with its log."""


class Interrupted(GymexpError):
    """SIGINT or SIGTERM, or in a Slurm job SIGUSR2, ended the run, with what was done saved. `number`: the
    signal's."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
