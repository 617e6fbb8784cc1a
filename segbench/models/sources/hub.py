"""Repositories of the Hugging Face hub: their configuration and weights as a folder of this machine."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from segbench.errors import ModelError
from segbench.models.sources.image_model import log
from segbench.models.sources.names import is_path

PROCESSOR = "preprocessor_config.json"
CONFIGS = ("config.json", PROCESSOR, "processor_config.json")
# The first kind that a repository has is taken, as transformers does.
WEIGHTS = (
    r"model\.safetensors",
    r"model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)",
    r"pytorch_model\.bin",
    r"pytorch_model(-\d+-of-\d+\.bin|\.bin\.index\.json)",
)


def folder_of(name: str, revision: str | None, *, offline: bool) -> Path:
    """A local folder as it is, or a repository of the Hub, downloaded into its cache; ModelError says what is wrong."""
    path = Path(name).expanduser()
    if is_path(name) and path.is_dir():
        if revision is not None:
            raise ModelError(f"{name} is a folder of this machine, which has no revision {revision!r}. Leave out @.")
    elif is_path(name):
        raise ModelError(f"There is no folder {name}. A path is relative to the folder where segbench is called.")
    else:
        path = fetch(name, revision, offline=offline)
    if not (path / "config.json").is_file():
        raise ModelError(f"{name} has no config.json, so it is no model of this library. Save it with save_pretrained.")
    if not weights_in(path):
        raise ModelError(
            f"{name} has neither model.safetensors nor pytorch_model.bin. Save the model with save_pretrained"
            + ("." if path == Path(name).expanduser() else f"; or, while online: {_command(name, revision)}")
        )
    return path


def is_known_to_lack(folder: Path, file: str) -> bool:
    """Whether a folder is complete without that file: one of the user, or of a cache that knows that there is none."""
    in_cache = folder.parent.name == "snapshots"
    return not in_cache or (folder.parent.parent / ".no_exist" / folder.name / file).exists()


def weights_in(folder: Path) -> list[Path]:
    """The weights files of a folder: of the first kind of `WEIGHTS` that is there."""
    return [folder / name for name in _weights({file.name for file in folder.iterdir()}) if not name.endswith(".json")]


def fetch(repo: str, revision: str | None, *, offline: bool) -> Path:
    """Downloads configuration and weights of a repository; nothing else of it, and no code.

    Where the Hub cannot be reached, what its cache has is taken.
    """
    where = f"{repo}@{revision}" if revision else repo
    reason: Exception | None = None
    if not offline:
        try:
            return _download(repo, revision)
        except Exception as error:  # the client raises errors of its HTTP library too
            if _is_answer(error):
                raise ModelError(_mend(error, repo, revision, where)) from error
            reason = error
    found = _in_cache(repo, revision, where)
    if found is None:
        raise ModelError(
            f"{where} is not on this machine. While online: {_command(repo, revision)}"
            if reason is None
            else f"{where} is not on this machine, and cannot be downloaded: {type(reason).__name__}: "
            f"{_first_line(reason)}. Try again later; or, on a machine that is online: {_command(repo, revision)}"
        ) from reason
    if reason is not None:
        log.warning("The hub cannot be reached (%s); %s is taken from its cache.", _first_line(reason), where)
    return found


@contextmanager
def without_hub() -> Iterator[None]:
    """The hub's client, which the libraries use too, makes no request; as with ``HF_HUB_OFFLINE=1``."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _download(repo: str, revision: str | None) -> Path:
    """All files from the commit that the revision stands for when the first of them is asked for."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    info = api.model_info(repo, revision=revision)  # asked once; a file is asked for again and again, for half a minute
    folder = Path(api.hf_hub_download(repo, "config.json", revision=revision)).parent  # named after its commit
    if folder.name != info.sha:
        info = api.model_info(repo, revision=folder.name)
    names = {file.rfilename for file in info.siblings or []}
    for name in [*sorted(names & set(CONFIGS)), *_weights(names)]:
        api.hf_hub_download(repo, name, revision=folder.name)
    if PROCESSOR not in names:  # asked for all the same: the client remembers in its cache that there is none
        with suppress(huggingface_hub.errors.EntryNotFoundError):
            api.hf_hub_download(repo, PROCESSOR, revision=folder.name)
    return folder


def _in_cache(repo: str, revision: str | None, where: str) -> Path | None:
    import huggingface_hub

    try:
        path = huggingface_hub.try_to_load_from_cache(repo, "config.json", revision=revision)
    except huggingface_hub.errors.HFValidationError as error:
        raise ModelError(_mend(error, repo, revision, where)) from error
    return Path(path).parent if isinstance(path, str) else None


def _weights(names: Collection[str]) -> list[str]:
    for pattern in WEIGHTS:
        if found := sorted(name for name in names if re.fullmatch(pattern, name)):
            return found
    return []


def _is_answer(error: Exception) -> bool:
    """Whether the hub, or a check of the name, says something about the repository; else it could not be asked."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, errors.HFValidationError) or (status is not None and status < 500 and status != 429)


def _mend(error: Exception, repo: str, revision: str | None, where: str) -> str:
    """What the hub's answer means, and what to do."""
    from huggingface_hub import errors

    token = "set HF_TOKEN, or: hf auth login"
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is no repository of the hub (owner/repository); a folder of this machine begins with ./"
    if isinstance(error, errors.GatedRepoError):
        return f"The repository {where} is gated. Accept its terms on its page, then {token}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"The hub has no repository {repo!r}, or it is private. Correct the name (owner/repository; a folder of "
            f"this machine begins with ./); for a private one {token}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"The repository {repo} has no revision {revision!r}. After @ goes a branch, a tag or a commit."
    if isinstance(error, errors.EntryNotFoundError):
        return f"The repository {where} has no config.json, so it holds no model of this library."
    return f"The hub refuses {where}: {_first_line(error)}. If it needs a login, {token}"


def _command(repo: str, revision: str | None) -> str:
    return f"hf download {repo}" + (f" --revision {revision}" if revision else "")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
