"""Checks of the Hugging Face hub and the tracker: whether they can be reached, and the user's login."""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from huggingface_hub import constants, get_token, try_to_load_from_cache

from gymexp.doctor.finding import Finding, Subject
from gymexp.policy import hub_snapshot

_TIMEOUT_S = 8.0
_WANDB = "https://api.wandb.ai"


def hub(subject: Subject) -> Iterable[Finding]:
    """Yields a finding about the hub itself, then one for each model and dataset that the run must download.

    A model or dataset is checked by one of its files.
    """
    endpoint, token = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/"), get_token()
    downloads = _downloads(subject)
    missing = [key for key, download in downloads.items() if not _cached(*download)]
    if constants.HF_HUB_OFFLINE:
        for key in missing:
            fix = "unset HF_HUB_OFFLINE once and fetch it: hf download " + downloads[key][0]
            yield Finding(
                "fail", "hub", f"HF_HUB_OFFLINE is set, and {key}={downloads[key][0]} is not here", fix
            )
        if not missing:
            text = "HF_HUB_OFFLINE is set" + (", and all files are in the cache" if downloads else "")
            yield Finding("ok", "hub", text)
        return
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        path = "/api/whoami-v2" if token else "/api/models?limit=1"
        answer = httpx.get(endpoint + path, headers=headers, timeout=_TIMEOUT_S)
    except httpx.HTTPError as error:
        level = "fail" if missing else "warn"
        text = f"{endpoint} cannot be reached ({str(error) or type(error).__name__})"
        text += f"; needed for {', '.join(missing)}" if missing else ""
        yield Finding(
            level, "hub", text, "HF_ENDPOINT=… names a mirror, HF_HUB_OFFLINE=1 uses the cache alone"
        )
        return
    if token and answer.status_code == 401:
        yield Finding("fail", "hub", f"{endpoint} refuses the token", "hf auth login, or set HF_TOKEN")
        return
    if answer.status_code >= 400:
        text = f"{endpoint} answers HTTP {answer.status_code}"
        yield Finding("fail" if missing else "warn", "hub", text, "look at HF_ENDPOINT, or try again later")
        return
    yield Finding("ok", "hub", f"{endpoint} answers, {'with' if token else 'without'} a token")
    for key in missing:
        yield _look_at_download(endpoint, headers, key, *downloads[key])


def _downloads(subject: Subject) -> dict[str, tuple[str, str, str, str]]:
    """Returns what the run takes from the hub: key of the configuration -> repository, its kind, one of its
    files, revision."""
    model = subject.config.model
    downloads = {}
    path = hub_snapshot.resolve_path(model.path)
    if not Path(path).is_absolute():
        downloads["model.path"] = (path, "model", "config.json", model.revision or "main")
    for name, env in subject.config.env.items():
        data = env.data
        if data.source == "huggingface" and data.repo_id and data.train_file:
            downloads[f"env.{name}.data.repo_id"] = (data.repo_id, "dataset", data.train_file, data.revision)
    return downloads


def _cached(repo: str, kind: str, file: str, revision: str) -> bool:
    if kind == "model":
        return hub_snapshot.cached(repo, revision) is not None
    return isinstance(try_to_load_from_cache(repo, file, revision=revision, repo_type=kind), str)


def _look_at_download(
    endpoint: str, headers: dict[str, str], key: str, repo: str, kind: str, file: str, revision: str
) -> Finding:
    """Returns a finding about whether the hub lets this user download `file`."""
    folder = "datasets/" if kind == "dataset" else ""
    url = f"{endpoint}/{folder}{repo}/resolve/{revision}/{file}"
    try:
        status = httpx.head(url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True).status_code
    except httpx.HTTPError as error:
        return Finding("fail", "hub", f"{url}: {str(error) or type(error).__name__}", "try again later")
    if status < 400:
        return Finding("ok", "hub", f"{key}={repo} can be downloaded")
    if status in (401, 403):
        fix = f"accept its terms at {endpoint}/{folder}{repo}, then hf auth login"
        return Finding("fail", "hub", f"{key}={repo} is gated or private (HTTP {status})", fix)
    return Finding(
        "fail", "hub", f"{key}={repo}: HTTP {status} for {file}", f"look at {key} and its revision"
    )


def tracker(subject: Subject) -> Iterable[Finding]:
    """Yields a finding about the tracker: whether it is installed, has a login, and can be reached."""
    config = subject.config.tracker
    if config.kind in ("trackio", "mlflow", "tensorboard"):
        if importlib.util.find_spec(config.kind):
            yield Finding("ok", "tracker", config.kind)
        else:
            yield Finding("fail", "tracker", f"{config.kind} is not installed", f"pip install {config.kind}")
        return
    if config.kind == "none":
        yield Finding("ok", "tracker", "none: metrics are in the run directory alone")
        return
    mode = config.mode or os.environ.get("WANDB_MODE") or "online"
    if mode != "online":
        yield Finding("ok", "tracker", f"wandb, {mode}")
        return
    url = os.environ.get("WANDB_BASE_URL", _WANDB).rstrip("/")
    if not (os.environ.get("WANDB_API_KEY") or _in_netrc(urlsplit(url).hostname or "")):
        fix = "wandb login, or set WANDB_API_KEY, or say tracker.mode=offline"
        yield Finding("fail", "tracker", f"wandb has no key for {url}", fix)
        return
    try:
        httpx.get(url, timeout=_TIMEOUT_S)
    except httpx.HTTPError as error:
        text = f"{url} cannot be reached ({str(error) or type(error).__name__})"
        yield Finding("fail", "tracker", text, "say tracker.mode=offline, and later: wandb sync")
        return
    yield Finding("ok", "tracker", f"wandb, {url} answers, and a key is set")


def _in_netrc(host: str) -> bool:
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
