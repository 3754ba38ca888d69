"""Whether tracker=wandb could begin a run here: asked before anything starts, without the network."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from gymexp.config.schema import TrackerConfig

_LOG_MODEL = "WANDB_LOG_MODEL"


def problems(tracker: TrackerConfig) -> Iterator[str]:
    """For a tracker whose package is installed."""
    if tracker.kind != "wandb":
        return
    # transformers' callback would upload what it saves itself, in the middle of a run and again at its end.
    if (log_model := os.environ.get(_LOG_MODEL, "false")).lower() not in ("", "0", "false"):
        yield (
            f"{_LOG_MODEL} must be unset or false with tracker=wandb, as gymexp uploads no weights, got "
            f"{log_model!r}: unset it, and run `wandb artifact put RUN/model` afterwards"
        )
    if reason := _no_login(tracker.mode):
        yield (
            f"tracker=wandb needs a login of wandb's: {reason}. Run `wandb login`, set WANDB_API_KEY, or say "
            "tracker.mode=offline"
        )


@functools.cache  # imports wandb: a second
def _no_login(mode: str | None) -> str:
    """Why wandb.init would not find a login, empty where it finds or needs none. mode: of tracker.mode."""
    import wandb
    from wandb.errors import term
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib.wbauth import authenticate_session

    term.termsetup(wandb.Settings(silent=True), None)  # it would say where it found a key
    settings = wandb_setup.singleton().settings
    if (mode or settings.mode) in ("offline", "disabled", "dryrun"):
        return ""
    try:
        host = settings.base_url
        found = authenticate_session(host=host, source="gymexp", prompt=False, update_session=False)
    except wandb.Error as error:
        return str(error).rstrip(".")
    return "" if found else f"there is none for {host} in its environment variables, settings and netrc file"
