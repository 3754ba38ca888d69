"""Reads YAML that a stranger may have written. Plain values need no aliases, with which a small file
describes a huge one, and little depth."""

from __future__ import annotations

import yaml

_MAX_DEPTH = 60
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_plain_yaml(text: str | bytes) -> None:
    """Raises ValueError unless the text is YAML without aliases, nested at most 60 deep."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"line {event.start_mark.line + 1} has an alias (*{event.anchor})")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise ValueError(f"line {event.start_mark.line + 1} is nested more than {_MAX_DEPTH} deep")
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def load_plain_yaml(text: str | bytes) -> object:
    """Returns the value of YAML that `check_plain_yaml` lets pass. Raises ValueError for other YAML."""
    check_plain_yaml(text)
    try:
        return yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
