"""The exceptions that end a run. Each message names key, rule, value and fix."""


class GymexpError(Exception):
    """A run cannot start or continue, for a reason that the user can act on; printed without a traceback."""


class ConfigError(GymexpError):
    """The configuration breaks a rule. Raised before anything starts."""


class DataError(GymexpError):
    """A data file or row breaks a rule, or a source cannot be reached."""


class ServiceError(GymexpError):
    """A process of the run (server, gateway, trainer) could not start, died too often or hangs."""


class NodeLost(ServiceError):
    """A node of the run is lost, with every process that ran on it."""


class RunDirectoryError(GymexpError):
    """The run directory is in use, or lacks files that a resumed run needs."""


class TokenMismatch(GymexpError):
    """Tokens of a rollout contradict each other, so that training on the rollout would be wrong.

    Such rollouts are counted as failed; their tokens are never padded to fit.
    """


class RolloutError(GymexpError):
    """Too many rollouts failed for training to continue. The message names the failed server and its log."""


class DriftError(GymexpError):
    """The engine's and the trainer's log-probabilities of the same tokens differ by more than the bound."""


class DrawError(GymexpError):
    """Sampled tokens depend on each other, as independent draws from the policy would not."""


class LaunchError(GymexpError):
    """Slurm rejected a job, or submitted jobs failed. The message names each failed job and its log."""


class Interrupted(GymexpError):
    """A signal ended the run: SIGINT, SIGTERM or SIGHUP, or in a Slurm job SIGUSR2.

    number: the signal's number. The message says whether the trainer saved a checkpoint first.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
