"""Open files: how many a run needs, and how many a process may have.

A rollout needs sockets. Its agent has one for the trainer's request, two for the request that NeMo Gym's
agents send to themselves, and others to the model server and the resources servers.
"""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Mapping

from gymexp.config.schema import EnvConfig
from gymexp.errors import ConfigError

_MOST = 65535  # the limit that NeMo Gym's servers also set
_OWN = 40  # open files of a process without rollouts: measured 9 to 30
# Open files for each rollout in flight, measured with NeMo Gym 0.4: 5.8 in its agent, 2.7 in the model
# server, and fewer in the gateway and the trainer. All environments share the last three processes.
_OF_AGENT, _OF_SHARED = 6, 3
_MANY_ROLLOUTS = 64  # the most rollouts in flight if max_concurrency is not set


def raise_limit() -> None:
    """Raises this process's limit on open files to the system's hard limit; child processes inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(_MOST, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has a limit of its own below the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def limit() -> int:
    """Returns how many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else soft


def concurrency(envs: Mapping[str, EnvConfig]) -> dict[str, int]:
    """Returns the rollouts in flight allowed for each environment.

    It is `max_concurrency` if that is set, else as many as the limit on open files allows, up to 64. Raises
    ConfigError if the limit does not allow `max_concurrency`.
    """
    configured = {name: env.max_concurrency for name, env in envs.items()}
    room = (limit() - _OWN) // _OF_SHARED - sum(filter(None, configured.values()))
    share = room // max(1, sum(value is None for value in configured.values()))
    allowed = {}
    for name, env in envs.items():
        replicas = env.replicas if isinstance(env.replicas, int) else 1  # auto: the least that it has
        of_agent = (limit() - _OWN) // _OF_AGENT * replicas
        allowed[name] = env.max_concurrency or max(1, min(_MANY_ROLLOUTS, of_agent, share))
        if allowed[name] > of_agent:
            takes = math.ceil(allowed[name] / replicas) * _OF_AGENT + _OWN
            raise ConfigError(
                f"env.{name}.max_concurrency must be at most {of_agent}, got {allowed[name]}: an agent would "
                f"have {takes} files open, and the limit is {limit()}. Raise it (`ulimit -n {takes}`), or "
                f"set env.{name}.max_concurrency={of_agent}, or more env.{name}.replicas"
            )
    if room < 0:
        total = sum(allowed.values())
        takes = total * _OF_SHARED + _OWN
        raise ConfigError(
            f"env.*.max_concurrency must be at most {(limit() - _OWN) // _OF_SHARED} together, got {total}: "
            f"the model server would have {takes} files open, and the limit is {limit()}. Raise it "
            f"(`ulimit -n {takes}`), or set smaller ones"
        )
    return allowed
