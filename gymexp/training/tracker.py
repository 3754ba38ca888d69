"""The check of whether tracker=wandb can start a run on this machine. It needs no network."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from gymexp.config.schema import TrackerConfig

_LOG_MODEL = "WANDB_LOG_MODEL"


def problems(tracker: TrackerConfig) -> Iterator[str]:
    """Yields the reasons why the tracker cannot work on this machine. Its package must be installed."""
    if tracker.kind != "wandb":
        return
    # The variable asks transformers to upload its saves, during a run and at its end.
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


@functools.cache  # Importing wandb takes a second.
def _no_login(mode: str | None) -> str:
    """Returns why wandb.init would find no login; empty if it finds or needs none. mode: tracker.mode."""
    import wandb
    from wandb.errors import term
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib.wbauth import authenticate_session

    term.termsetup(wandb.Settings(silent=True), None)  # Otherwise wandb prints where it found a key.
    settings = wandb_setup.singleton().settings
    if (mode or settings.mode) in ("offline", "disabled", "dryrun"):
        return ""
    try:
        host = settings.base_url
        login = authenticate_session(host=host, source="gymexp", prompt=False, update_session=False)
    except wandb.Error as error:
        return str(error).rstrip(".")
    return "" if login else f"there is none for {host} in its environment variables, settings and netrc file"
