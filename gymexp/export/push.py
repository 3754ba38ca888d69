"""Pushes an exported folder to the Hugging Face hub. A push that was interrupted can be repeated."""

from __future__ import annotations

import json
import os
from pathlib import Path

import httpx
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from gymexp.data import hub
from gymexp.errors import GymexpError
from gymexp.export.folder import MARK
from gymexp.files import read_json

_OF_THE_HUB = (".gitattributes",)  # what the hub puts into a new repository


def check_login() -> None:
    """Raises GymexpError unless huggingface_hub finds a token: in HF_TOKEN, or stored by `hf auth login`."""
    if get_token() is None:
        raise GymexpError(
            "--push needs a token that may write to the hub, and none was found: say `hf auth login`, or set "
            "HF_TOKEN"
        )


def push(folder: Path, repo: str, public: bool) -> str:
    """Uploads the folder to a model repository, which is made if necessary, and returns its address.

    Files that the repository already has are not sent again. Raises GymexpError if the repository has other
    files than an export of the same run or another visibility, or if the hub refuses or cannot be reached.
    """
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    api = HfApi(endpoint)
    try:
        if not _exists(api, folder, repo, public):
            api.create_repo(repo, private=not public, exist_ok=True)
        mark = read_json(folder / MARK)
        # The hub may get a folder in several commits. The mark comes first, as it lets a push go on.
        api.upload_file(path_or_fileobj=folder / MARK, path_in_repo=MARK, repo_id=repo)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=f"gymexp export, step {mark['step']}",
            # Of an earlier push: the shards of a model that had more of them, the files of another form.
            delete_patterns="*",
        )
    except (httpx.HTTPError, HFValidationError, OSError, RuntimeError, ValueError) as error:
        raise GymexpError(_explain(error, repo, endpoint, folder)) from None
    return f"{endpoint}/{repo}"


def _exists(api: HfApi, folder: Path, repo: str, public: bool) -> bool:
    """Returns whether the repository exists; raises GymexpError if it must not be pushed to."""
    try:
        info = api.model_info(repo, timeout=hub.ANSWER_TIMEOUT_S)
    except RepositoryNotFoundError:
        return False
    if bool(info.private) is public:
        now, wish = ("private", "--public") if info.private else ("public", "no --public")
        fix = "leave --public out" if info.private else "say --public"
        raise GymexpError(
            f"--push {repo}: the repository exists and is {now}, but the command has {wish}: {fix}, or "
            "change the repository's visibility in its settings"
        )
    others = [s.rfilename for s in info.siblings or [] if s.rfilename not in _OF_THE_HUB]
    if others and _mark_of(api, repo).get("run") != read_json(folder / MARK)["run"]:
        raise GymexpError(
            f"--push {repo}: the repository exists and has files that are no export of this run "
            f"({', '.join(others[:3])}…): choose another name, or delete the repository"
        )
    return True


def _mark_of(api: HfApi, repo: str) -> dict[str, object]:
    try:
        mark = json.loads(Path(api.hf_hub_download(repo, MARK)).read_bytes())
    except (EntryNotFoundError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}


def _explain(error: Exception, repo: str, endpoint: str, folder: Path) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    again = f"the folder {folder} is whole; the same command goes on with it"
    if isinstance(error, HFValidationError):
        return f"--push must be a name like user/name, got {repo!r}: {str(error).splitlines()[0]}"
    if isinstance(error, OfflineModeIsEnabled):
        return f"--push {repo}: HF_HUB_OFFLINE is set: unset it ({again})"
    if status in (401, 403):
        return (
            f"--push {repo}: the hub at {endpoint} refuses the token (HTTP {status}): say `hf auth login` "
            f"with a token that may write to {repo.partition('/')[0]} ({again})"
        )
    if status is not None:
        return f"--push {repo}: the hub at {endpoint} answered HTTP {status}: try again ({again})"
    if isinstance(error, httpx.TimeoutException):
        return f"--push {repo}: the hub at {endpoint} did not answer: try again ({again})"
    if isinstance(error, httpx.HTTPError):
        return f"--push {repo}: the hub at {endpoint} cannot be reached ({error}): try again ({again})"
    return f"--push {repo}: the upload failed ({str(error).splitlines()[0]}): try again ({again})"
