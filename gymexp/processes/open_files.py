"""Open files: how many a run takes, and how many a process may have.

What a rollout takes is sockets: an agent has one for the trainer's request, two for the request to itself
that NeMo Gym's agents make, and others to the model server and the resources servers.
"""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Mapping

from gymexp.config.schema import EnvConfig
from gymexp.errors import ConfigError

_MOST = 65535  # as NeMo Gym's servers want, too
_OWN = 40  # of a process that plays nothing: 9 to 30 were counted
# A rollout in flight, counted with NeMo Gym 0.4: 5.8 in its agent; 2.7 in the model server, and fewer in the
# gateway and the trainer, which are the same for all environments.
_OF_AGENT, _OF_SHARED = 6, 3
_MANY_ROLLOUTS = 64  # where max_concurrency is not set


def raise_limit() -> None:
    """Let this process, and those that it starts, have as many open files as the system lets it have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(_MOST, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has a limit of its own below the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def limit() -> int:
    """How many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else soft


def concurrency(envs: Mapping[str, EnvConfig]) -> dict[str, int]:
    """Rollouts in flight of each environment: `max_concurrency`, or as many as the limit has room for, up to
    64. Raises ConfigError for more than it has room for."""
    asked = {name: env.max_concurrency for name, env in envs.items()}
    room = (limit() - _OWN) // _OF_SHARED - sum(filter(None, asked.values()))
    share = room // max(1, sum(value is None for value in asked.values()))
    found = {}
    for name, env in envs.items():
        of_agent = (limit() - _OWN) // _OF_AGENT * env.replicas
        found[name] = env.max_concurrency or max(1, min(_MANY_ROLLOUTS, of_agent, share))
        if found[name] > of_agent:
            takes = math.ceil(found[name] / env.replicas) * _OF_AGENT + _OWN
            raise ConfigError(
                f"env.{name}.max_concurrency must be at most {of_agent}, got {found[name]}: an agent would "
                f"have {takes} files open, and the limit is {limit()}. Raise that (`ulimit -n {takes}`), or "
                f"say env.{name}.max_concurrency={of_agent}, or more env.{name}.replicas"
            )
    if room < 0:
        total = sum(found.values())
        takes = total * _OF_SHARED + _OWN
        raise ConfigError(
            f"env.*.max_concurrency must be at most {(limit() - _OWN) // _OF_SHARED} together, got {total}: "
            f"the model server would have {takes} files open, and the limit is {limit()}. Raise that "
            f"(`ulimit -n {takes}`), or say smaller ones"
        )
    return found
