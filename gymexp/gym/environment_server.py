"""NeMo Gym's environment servers, which since 0.7 stand in front of agents and run their episodes.

Most are relays (`legacy_agent`): they pass `/run` to their agent unchanged, so gymexp asks the agent itself.
Any other takes a typed episode, which names itself and its task, and returns a result or a failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

KIND = "environment_servers"
_AGENTS = "responses_api_agents"
_RELAY = "legacy_agent"


def fronts_of(servers: Mapping[str, Any], agent: str) -> list[str]:
    """Returns the names of the environment servers that refer to the agent, relays included."""
    return [name for name, value in servers.items() if agent in _agents_of(value)]


def front_of(servers: Mapping[str, Any], agent: str) -> str | None:
    """Returns the environment server that runs the agent's episodes; None if the agent runs them itself."""
    fronts = [name for name in fronts_of(servers, agent) if _RELAY not in servers[name][KIND]]
    return fronts[0] if fronts else None


def reasons_against(servers: Mapping[str, Any], agent: str) -> Iterator[str]:
    """Yields why the environment servers in front of an agent cannot run its episodes."""
    fronts = fronts_of(servers, agent)
    if len(fronts) > 1:
        yield (
            f"{agent} has several environment servers ({', '.join(fronts)}), and its rows cannot say which: "
            "keep one in a copy of the file"
        )
    elif (front := front_of(servers, agent)) and len(agents := _agents_of(servers[front])) > 1:
        yield (
            f"its environment server {front} plays several agents ({', '.join(agents)}), whose episodes have "
            "no tokens of the policy at NeMo Gym's places"
        )


def warning_of(servers: Mapping[str, Any], agent: str, site: Path) -> str:
    """Returns the warning that NeMo Gym gives for an agent without an environment server, or "".

    site: the directory of NeMo Gym's folders; a NeMo Gym before 0.7 has no environment servers.
    """
    if fronts_of(servers, agent) or not (site / KIND).is_dir():
        return ""
    return (
        f"{agent} has no environment server. This NeMo Gym relays to such an agent; a later one will refuse "
        f"it: add one of {KIND}.{_RELAY} with agent_server: {{type: {_AGENTS}, name: {agent}}}"
    )


def with_types(values: dict[str, Any]) -> dict[str, Any]:
    """Returns an environment server's configuration with the type that its `agent_server` may leave out."""
    agent = values.get("agent_server")
    return values | {"agent_server": {"type": _AGENTS} | agent} if isinstance(agent, dict) else values


def _agents_of(definition: Any) -> list[str]:
    """Returns the agents that an environment server's definition refers to; none for another server. As in
    NeMo Gym, the key `agent_server` may leave its type out."""
    kinds = definition.get(KIND) if isinstance(definition, dict) else None
    found = [
        value["name"]
        for values in (kinds or {}).values()
        for key, value in (values or {}).items()
        if isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and (value.get("type") == _AGENTS or (key == "agent_server" and value.get("type") is None))
    ]
    return list(dict.fromkeys(found))
