"""Turn a model's name into a folder on disk: a local one, the bundled demo, Hugging Face, ModelScope."""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path

from qwenvl_mlx.errors import HubError
from qwenvl_mlx.models import GENERATIONS

DEMO = "demo"
MODELSCOPE = "modelscope:"
HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
SMALL_FILES = ["*.json", "*.jinja", "*.tiktoken", "merges.txt", "README.md", "LICENSE*", "NOTICE*"]
WEIGHT_FILES = ("*.safetensors", "*.bin")  # the first kind that a repository has is enough
NOT_NEEDED = ["*/*", "training_args.bin", "optimizer.bin", "scheduler.bin"]


def resolve(name: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of the model ``name``, downloaded if need be (only the files that are needed).

    ``name``: a folder; ``"demo"``; ``"owner/name"`` or ``"owner/name@revision"`` on Hugging Face, where HF_ENDPOINT,
    HF_HUB_OFFLINE and the cache are as that library has them; ``"modelscope:owner/name"``.
    ``weights=False``: configuration and tokenizer files only. Raises ``HubError``.
    """
    path, text = Path(name).expanduser(), os.fspath(name)
    if text and path.is_dir():
        return path
    if text == DEMO:
        return _demo()
    if text.startswith(MODELSCOPE):
        return _modelscope(text.removeprefix(MODELSCOPE), revision, weights=weights)
    hub = HUB_NAME.fullmatch(text)
    if hub is None or text.startswith(".") or path.exists():
        raise HubError(
            f"{text or repr(text)} is neither a folder nor a name like owner/model{_similar(path)}"
        )
    return _hugging_face(hub["repo"], revision or hub["revision"], weights=weights)


def upload(folder: Path, repo: str) -> None:
    """Upload all files of ``folder`` to the Hugging Face repository ``repo``, made if need be. Raises ``HubError``."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Upload MLX weights")
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:  # type: ignore[attr-defined]
        raise HubError(
            f"{repo} could not be uploaded ({_first_line(error)}): log in with 'hf auth login'; the folder {folder} is "
            "complete, only the upload failed"
        ) from error


def cached_models() -> list[str]:
    """Names of the Qwen vision-language models in Hugging Face's cache."""
    from huggingface_hub import constants

    configs = Path(constants.HF_HUB_CACHE).glob("models--*--*/snapshots/*/config.json")
    names = {config.parents[2].name for config in configs if _model_type(config) in GENERATIONS}
    return sorted(name.removeprefix("models--").replace("--", "/", 1) for name in names)


def _demo() -> Path:
    folder = Path(__file__).with_name("demo")
    if not (folder / "config.json").is_file():
        raise HubError(
            "this installation has no demo model: reinstall qwenvl-mlx, or pass the name of a model"
        )
    return folder


def _hugging_face(repo: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        for kind in WEIGHT_FILES if weights else ("config.json",):
            wanted = [*SMALL_FILES, kind]
            folder = Path(
                snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=NOT_NEEDED)
            )
            if any(folder.glob(kind)):
                return folder
    except errors.HFValidationError as error:
        raise HubError(f"{repo} is no valid name ({error})") from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo} is gated: accept its terms on its page, then log in with 'hf auth login' or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision {revision!r}: see its page for branches and tags") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repo} is neither a folder here nor a repository on the hub (or it is private: log in with "
            f"'hf auth login'){_similar(Path(repo))}"
        ) from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # httpx's, whichever the client uses
        raise HubError(_network_message(repo, error)) from error
    raise HubError(f"{repo} has no {' or '.join(WEIGHT_FILES) if weights else 'config.json'}: is it a model?")


def _network_message(repo: str, error: Exception) -> str:
    from huggingface_hub import constants

    reason = _first_line(error)
    if constants.HF_HUB_OFFLINE:
        why = f"{repo} is not wholly in the cache, and HF_HUB_OFFLINE forbids to fetch it"
    else:
        why = f"{repo} could not be fetched from {constants.ENDPOINT} ({reason}): try again, what has arrived is kept"
    cached = cached_models()
    return f"{why}; in the cache: {', '.join(cached) if cached else 'no Qwen vision-language model'}"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__


def _modelscope(repo: str, revision: str | None, *, weights: bool) -> Path:
    repo, _, wanted_revision = repo.partition("@")
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise HubError(
            "names with modelscope: need its client: pip install 'qwenvl-mlx[modelscope]'"
        ) from error
    try:
        for kind in WEIGHT_FILES if weights else ("config.json",):
            folder = Path(
                snapshot_download(
                    repo,
                    revision=revision or wanted_revision or None,
                    allow_patterns=[*SMALL_FILES, kind],
                    ignore_patterns=NOT_NEEDED,
                )
            )
            if any(folder.glob(kind)):
                return folder
    except (OSError, ValueError) as error:
        raise HubError(
            f"{repo} could not be fetched from ModelScope ({error}): check its name and try again"
        ) from error
    raise HubError(f"{repo} on ModelScope has no {' or '.join(WEIGHT_FILES) if weights else 'config.json'}")


def _model_type(config: Path) -> str | None:
    try:
        kind = json.loads(config.read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return kind if isinstance(kind, str) else None


def _similar(path: Path) -> str:
    """A hint at folders beside ``path`` with nearly the same name."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, cutoff=0.5)
    return f"; close to it: {', '.join(str(path.parent / name) for name in close)}" if close else ""
