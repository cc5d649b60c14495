"""The two hubs, each through its own client: make the repository, upload a folder, give the address."""

import importlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmft.convert.push.files import PushError
from mmft.hub import HUGGINGFACE, MODELSCOPE, is_offline


def check_repo(repo: str, hub: str) -> None:
    """Raise `PushError` for what is no name of a repository."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo) or ".." in repo or "--" in repo:
        raise PushError(f"{repo!r} is no name of a repository on {hub}; write owner/name, as in ming/my-llava")


def find_token(hub: str) -> str:
    """The access token for a hub, from the environment or an earlier login. Raises `PushError` where there is none."""
    if hub == MODELSCOPE:
        token = os.environ.get("MODELSCOPE_API_TOKEN")
        where, how = "https://modelscope.cn/my/myaccesstoken", "export MODELSCOPE_API_TOKEN=..."
    else:
        from huggingface_hub import get_token

        token = get_token()
        where, how = "https://huggingface.co/settings/tokens", "export HF_TOKEN=..., or run `hf auth login`"
    if not token:
        raise PushError(f"no access token for {hub}: make one that may write at {where}, then {how}")
    return token


@dataclass(frozen=True)
class Target:
    """Where a folder goes, and how: `branch` None is the hub's own, `license` what the person gave."""

    repo: str
    token: str
    message: str
    private: bool = False
    branch: str | None = None
    license: str | None = None


def push(folder: Path, hub: str, target: Target) -> str:
    """Upload everything in `folder` and return the address. Raises `PushError` in one line where it fails."""
    if is_offline():
        raise PushError("offline mode is on (HF_HUB_OFFLINE=1); unset it to upload")
    upload = {HUGGINGFACE: _huggingface, MODELSCOPE: _modelscope}[hub]
    try:
        return upload(folder, target)
    except PushError:
        raise
    except Exception as error:  # each client has its own, and those of requests, urllib3, httpx or httpx2 besides
        raise PushError(_failed(target.repo, hub, error)) from error


def _huggingface(folder: Path, target: Target) -> str:
    from huggingface_hub import HfApi

    api, repo = HfApi(token=target.token, library_name="mmft"), target.repo
    made = api.create_repo(repo, private=target.private or None, exist_ok=True)
    if target.private and not api.model_info(repo).private:
        raise PushError(f"{repo} is there already and public; make it private in its settings, or leave out --private")
    if target.branch and target.branch != "main":
        api.create_branch(repo, branch=target.branch, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message=target.message, revision=target.branch)
    return str(made)


def _modelscope(folder: Path, target: Target) -> str:
    try:
        api: Any = importlib.import_module("modelscope.hub.api").HubApi()
    except ImportError as error:
        raise PushError(f"--hub modelscope needs modelscope: {error}; pip install 'mmft[modelscope]'") from error
    repo, token = target.repo, target.token
    there = api.repo_exists(repo, repo_type="model", token=token)
    if there and target.private:
        raise PushError(f"{repo} is there already and stays as visible as it is; leave out --private")
    if not there and target.license is None:
        raise PushError("a new repository on modelscope has a licence, Apache-2.0 unless told: give --license")
    if not there:
        visibility = "private" if target.private else "public"
        api.create_repo(repo, token=token, visibility=visibility, license=target.license, repo_type="model")
    api.upload_folder(
        repo_id=repo, folder_path=str(folder), commit_message=target.message, token=token, repo_type="model",
        revision=target.branch or "master",
    )  # fmt: skip
    return f"https://modelscope.cn/models/{repo}"


def _failed(repo: str, hub: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    status = getattr(getattr(error, "response", None), "status_code", None)
    advice = {
        401: "; the token is not valid: make a new one",
        403: "; the token may not write there: make one that may, or choose an owner it belongs to",
        404: "; there is no such repository, or the token may not see it",
    }.get(status or 0, "; nothing is lost: run the command again")
    return f"{repo} was not uploaded to {hub}: {lines[0] if lines else type(error).__name__}{advice}"
