"""`source=huggingface`: files of a dataset repository, with a deadline on every wait.

`hf_hub_download` retries an unreachable hub with growing pauses. So a single request without retries goes
first, and shows within seconds whether the hub can be reached. If not, the cached file is used.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from gymexp.config.schema import DataConfig
from gymexp.data.cache import Say
from gymexp.errors import DataError

ANSWER_TIMEOUT_S = 10.0
_STALL_TIMEOUT_S = 30.0  # without a byte of progress


def download(name: str, data: DataConfig, say: Say) -> tuple[Path, Path]:
    """Returns the train and the validation file in huggingface_hub's own cache (HF_HOME), both of one commit.
    Raises DataError that says why a file cannot be had, and what to set instead."""
    assert data.repo_id and data.train_file  # gymexp.config.rules has checked it
    train, commit = fetch_file(name, data, data.train_file, data.revision, say)
    if data.validation_share is not None:
        return train, train
    assert data.validation_file
    validation, _ = fetch_file(name, data, data.validation_file, commit, say)
    return train, validation


def fetch_file(name: str, data: DataConfig, file: str, revision: str, say: Say) -> tuple[Path, str]:
    """Returns the path of one file, and the commit that it comes from."""
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    repo_file: dict[str, Any] = {"repo_id": data.repo_id, "filename": file, "repo_type": "dataset"}
    url = "?"
    try:
        url = hf_hub_url(**repo_file, revision=revision, endpoint=endpoint)
        token = get_token()
        metadata = get_hf_file_metadata(url, token=token, timeout=ANSWER_TIMEOUT_S, endpoint=endpoint)
        if not metadata.commit_hash:
            raise Unusable("the server is not a Hugging Face hub (no X-Repo-Commit in its answer)")
        if not _cached_file(repo_file, metadata.commit_hash):
            megabytes = "" if metadata.size is None else f" ({metadata.size / 1e6:.1f} MB)"
            say(f"{name}: downloading {file} of {data.repo_id}{megabytes}")
        # Ask for the revision's name, not the commit: only then does huggingface_hub find the file by that
        # name again without the network.
        path = Path(watched(hf_hub_download, **repo_file, revision=revision, endpoint=endpoint, token=token))
        return path, _commit(path, file)
    except (httpx.HTTPError, OSError, HFValidationError, Unusable) as error:
        if not isinstance(error, RevisionNotFoundError | EntryNotFoundError) and (
            path := _cached_file(repo_file, revision)
        ):
            commit = _commit(path, file)
            why = reason(error, "dataset")
            say(f"{name}: {why}; using {file} as downloaded before (commit {commit[:12]})")
            return path, commit
        raise DataError(_failure_message(name, data, file, revision, url, error)) from None


class Unusable(Exception):
    """The hub answered, but not with the file."""


def _cached_file(repo_file: dict[str, Any], revision: str) -> Path | None:
    """Returns the file in huggingface_hub's cache, or None if it is not cached. Uses no network."""
    try:
        return Path(hf_hub_download(**repo_file, revision=revision, local_files_only=True))
    except (OSError, HFValidationError):  # LocalEntryNotFoundError is a FileNotFoundError
        return None


def _commit(path: Path, file: str) -> str:
    """Returns the commit of a cached file: huggingface_hub keeps `file` as …/snapshots/<commit>/<file>."""
    return path.parents[len(Path(file).parts) - 1].name


def watched(download: Callable[..., str], **arguments: Any) -> str:
    """Runs `download` (`hf_hub_download` or `snapshot_download`) and returns its result. Raises its
    exceptions, and Unusable if no byte arrives for `_STALL_TIMEOUT_S`: its own retries go on for minutes."""
    last_progress = time.monotonic()

    class Watched(tqdm):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> bool | None:
            nonlocal last_progress
            last_progress = time.monotonic()
            return super().update(n)

    result: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            result.put(download(**arguments, tqdm_class=Watched, etag_timeout=ANSWER_TIMEOUT_S))
        except Exception as error:  # the thread that waits raises it again
            result.put(error)

    threading.Thread(target=work, daemon=True, name="hub-download").start()
    while True:
        try:
            outcome = result.get(timeout=0.5)
        except queue.Empty:
            if time.monotonic() - last_progress > _STALL_TIMEOUT_S:
                raise Unusable(f"the download stood still for {_STALL_TIMEOUT_S:.0f} s") from None
            continue
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def reason(error: Exception, kind: str) -> str:
    """Returns why the hub did not give a file. kind: the kind of repository, "dataset" or "model"."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HFValidationError):
        return str(error).splitlines()[0]
    if isinstance(error, GatedRepoError):
        return f"the {kind} is gated (HTTP {error.response.status_code})"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such {kind}, or a private one (HTTP {error.response.status_code})"
    if isinstance(error, RevisionNotFoundError):
        return f"the {kind} has no such revision (HTTP {error.response.status_code})"
    if isinstance(error, EntryNotFoundError):
        return f"the {kind} has no such file (HTTP 404)"
    if isinstance(error, HfHubHTTPError):
        return f"the hub answered HTTP {error.response.status_code}"
    if isinstance(error, httpx.TimeoutException):
        return f"the hub did not answer within {ANSWER_TIMEOUT_S:.0f} s"
    return f"the hub cannot be reached ({error})" if isinstance(error, httpx.HTTPError) else str(error)


def _failure_message(
    name: str, data: DataConfig, file: str, revision: str, url: str, error: Exception
) -> str:
    """Says why `file` cannot be had, and what to set instead."""
    at, why = f"env.{name}.data", reason(error, "dataset")
    lines = [
        f"{at}.repo_id: cannot get {file} of {data.repo_id} (revision {revision}): {why}",
        f"  tried: {url}",
    ]
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        note = "the one given was sent" if get_token() else "none was given"
        lines.append(f"  a token is taken from HF_TOKEN; {note}")
    lines.append("What you can do:")
    if data.generator:
        lines.append(f"  {at}.source=generate    makes the tasks on this machine, without network")
    lines.append(f"  {at}.source=jsonl {at}.train_file=… {at}.validation_file=…    takes your own files")
    return "\n".join(lines)
