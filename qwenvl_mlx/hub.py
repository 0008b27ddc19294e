"""Turn a model's name into a folder on disk: a local one, the bundled demo, Hugging Face, ModelScope."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qwenvl_mlx.errors import HubError
from qwenvl_mlx.models import GENERATIONS

log = logging.getLogger(__name__)

DEMO = "demo"
MODELSCOPE = "modelscope:"
HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
SMALL_FILES = ["*.json", "*.jinja", "*.tiktoken", "merges.txt", "README.md", "LICENSE*", "NOTICE*"]
WEIGHT_FILES = ("*.safetensors", "*.bin")  # the first kind that a repository has is enough
CONFIG = "config.json"
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
    if path.is_file():
        raise HubError(
            f"{text} is a file: pass the folder of a checkpoint (of safetensors or .bin; not GGUF)"
        )
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
    # RuntimeError: how the client wraps what went wrong with one file
    except (errors.HTTPError, errors.HFValidationError, OSError, RuntimeError) as error:  # type: ignore[attr-defined]
        raise HubError(
            f"{repo} could not be uploaded ({_first_line(error)}): check the network, or log in with 'hf auth login' "
            f"as one who may write there; {folder} is complete, only the upload failed: repeat it with "
            f"'hf upload {repo} {folder}'"
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

    def fetch(wanted: list[str]) -> str:
        return snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=NOT_NEEDED)

    try:
        folder = _fetched(fetch, weights=weights)
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
    return _complete(folder, repo, weights=weights)


def _fetched(fetch: Callable[[list[str]], str], *, weights: bool) -> Path | None:
    """The folder that ``fetch(patterns)`` fills, asked for one kind of files after the other until there are any."""
    for kind in WEIGHT_FILES if weights else (CONFIG,):
        folder = Path(fetch([*SMALL_FILES, kind]))
        if any(folder.glob(kind)):
            return folder
    return None


def _complete(folder: Path | None, repo: str, *, weights: bool) -> Path:
    if folder is None:
        raise HubError(f"{repo} has no {' or '.join(WEIGHT_FILES) if weights else CONFIG}: is it a model?")
    return folder


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
        from modelscope.hub import errors
    except ImportError as error:
        raise HubError(
            "names with modelscope: need its client: pip install 'qwenvl-mlx[modelscope]'"
        ) from error
    # Its errors have no common base in all versions.
    own = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    failures: tuple[type[Exception], ...] = (OSError, ValueError, *own)
    options = {"revision": revision or wanted_revision or None, "ignore_patterns": NOT_NEEDED}

    def fetch(wanted: list[str], **more: bool) -> str:
        return str(snapshot_download(repo, allow_patterns=wanted, **options, **more))

    try:
        folder = _fetched(fetch, weights=weights)
    except failures as error:
        folder = _cached(fetch, failures, weights=weights)
        reason = _first_line(error)
        if folder is None:
            raise HubError(
                f"{repo} could not be fetched from ModelScope ({reason}), and is not in its cache: check the name and "
                "the network, then try again"
            ) from error
        log.warning("%s is used as it was fetched before: ModelScope can't be asked (%s)", repo, reason)
    return _complete(folder, f"{repo} on ModelScope", weights=weights)


def _cached(
    fetch: Callable[..., str], failures: tuple[type[Exception], ...], *, weights: bool
) -> Path | None:
    """What ModelScope's client has on this machine; Hugging Face's falls back to that by itself."""
    try:
        return _fetched(partial(fetch, local_files_only=True), weights=weights)
    except failures:
        return None


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
