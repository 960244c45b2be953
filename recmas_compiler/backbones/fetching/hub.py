"""Models of the Hugging Face hub: exactly the files that a model is loaded from, told by size.

A repository holds much else: other formats, the same weights in pickles or in the form of their
makers, images. What is needed is known once the index of the weights has been read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from recmas_compiler.spec.document.places import UNKNOWN, SourcePosition, is_file
from recmas_compiler.spec.document.problems import problem_at
from recmas_runtime.core.errors import RecmasError, how_to_install
from recmas_runtime.core.progress import Advance, Progress, Silent
from recmas_runtime.core.text import counted, first_line, human_bytes

CONFIG: Final = "config.json"
_INDEX: Final = "model.safetensors.index.json"
_WEIGHTS: Final = "model.safetensors"
# The files of a causal language model besides its weights, as far as a repository has them; an
# adapter's config is fetched because it changes what the model is.
_SMALL_FILES: Final = (
    CONFIG,
    "generation_config.json",
    _INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/default.jinja",
    "adapter_config.json",
)
_LARGEST_INDEX_BYTES: Final = 64 << 20
_PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_MEGABYTE: Final = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """All files of a model are wanted: those that are missing are fetched.

    Attributes:
        offline: They are refused instead; the network is not touched.
    """

    progress: Progress = field(default_factory=Silent)
    offline: bool = False


def hub_model(
    repository: str, revision: str, *, position: SourcePosition = UNKNOWN, fetch: Fetch | None
) -> Path:
    """Return the folder of a repository's model in the local cache, named after its commit.

    Args:
        repository: `ORG/NAME`.
        revision: Branch, tag or commit.
        fetch: None to look at what is there, which may be the configuration alone. A commit whose
            files are all there is not asked for again.

    Raises:
        RecmasError: RM200 if it is not there or the disk is too small, RM201 without the package
            huggingface_hub, RM202 for a gated repository and for one without weights in
            safetensors.
    """
    if fetch is None:
        return hub_snapshot(repository, revision, position=position, download=False)
    found = _complete(repository, revision, position)
    if found is not None and found.name == revision:
        return found
    if fetch.offline or _is_offline():
        return _offline(repository, revision, position, found)
    with _hub_errors(repository, revision, position, download=True):
        return _fetched(repository, revision, position, fetch.progress)


def hub_snapshot(
    repository: str,
    revision: str,
    *,
    position: SourcePosition = UNKNOWN,
    download: bool,
    files: Sequence[str] = (CONFIG,),
) -> Path:
    """Return the folder of a Hugging Face repository in the local cache.

    Args:
        repository: `ORG/NAME`.
        revision: Branch, tag or commit. The folder is named after the commit.
        download: Fetch what is missing. Otherwise the network is not touched.
        files: Patterns of the files to fetch; others may or may not be there.

    Raises:
        RecmasError: RM200 if it is not there, RM201 if huggingface_hub is not, RM202 if it is
            gated.
    """
    with _hub_errors(repository, revision, position, download=download):
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(files),
                local_files_only=not download,
            )
        )


def _complete(repository: str, revision: str, position: SourcePosition) -> Path | None:
    """Return the folder of a revision in the cache if all that is needed is there."""
    try:
        folder = hub_snapshot(repository, revision, position=position, download=False)
    except RecmasError as error:
        if error.problems[0].code == "RM201":
            raise
        return None
    names = _weight_files(folder) or (_WEIGHTS,)
    return folder if all(is_file(folder / name) for name in (CONFIG, *names)) else None


def _is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the network, as the hub's library reads it."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _offline(repository: str, revision: str, position: SourcePosition, found: Path | None) -> Path:
    if found is not None:
        return found
    message = (
        f"{repository} at {revision} is not whole in the local cache, and the network is not to be "
        "used."
    )
    hint = (
        f"Fetch it where there is a network (hf download {repository} --revision {revision}), or "
        "leave --offline and HF_HUB_OFFLINE out."
    )
    raise RecmasError(problem_at(position, "RM200", message, hint=hint))


def _fetched(repository: str, revision: str, position: SourcePosition, progress: Progress) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    if CONFIG not in sizes:
        raise _no_model(repository, revision, position, sizes)

    def fetch(names: Sequence[str]) -> None:
        missing = [
            name
            for name in names
            if not isinstance(try_to_load_from_cache(repository, name, revision=info.sha), str)
        ]
        if not missing:
            return
        num_bytes = sum(sizes.get(name, 0) for name in missing)
        _check_disk(num_bytes, repository, position)
        size = f"{human_bytes(num_bytes)} in {counted(len(missing), 'file')}"
        title = f"Fetching {repository}: {size}, MB"
        with progress.stage(title, -(-num_bytes // _MEGABYTE)) as advance:
            bar = _reporting_to(advance)
            for name in missing:
                hf_hub_download(repository, name, revision=revision, tqdm_class=bar)

    fetch([name for name in _SMALL_FILES if name in sizes])
    folder = Path(hf_hub_download(repository, CONFIG, revision=revision)).parent
    weights = _weight_files(folder)
    if not weights and _WEIGHTS not in sizes:
        raise _no_model(repository, revision, position, sizes)
    fetch(weights or (_WEIGHTS,))
    return folder


def _weight_files(folder: Path) -> tuple[str, ...]:
    """Return the files that the index of the weights names; none without an index."""
    if not is_file(folder / _INDEX):
        return ()
    try:
        with (folder / _INDEX).open("rb") as stream:
            index = json.loads(stream.read(_LARGEST_INDEX_BYTES))
        names = {str(name) for name in index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ()  # whoever loads it says why
    return tuple(sorted(names))


def _no_model(
    repository: str, revision: str, position: SourcePosition, sizes: dict[str, int]
) -> RecmasError:
    """Return why a repository has no model that can be fetched, from the names of its files."""
    ggufs = sorted(name for name in sizes if name.endswith(".gguf"))
    pickled = sorted(name for name in sizes if name.endswith(_PICKLED) and "/" not in name)
    where = f"{repository} at {revision}"
    if "adapter_config.json" in sizes and CONFIG not in sizes:
        message = f"{where} is an adapter of PEFT without the model that it belongs to."
        hint = "Merge it into its model (peft: `merge_and_unload`) and name that folder."
    elif ggufs:
        message = f"{where} is a repository of GGUF files, such as {ggufs[0]}."
        hint = f"Fetch one (hf download {repository} {ggufs[0]}) and name it as `gguf:PATH`."
    elif CONFIG not in sizes:
        message = f"{where} has no {CONFIG}."
        return missing(position, message, "Choose a repository with a causal language model.")
    elif pickled:
        return no_safetensors(position, where, pickled[0])
    else:
        message = f"{where} has no weights: neither {_WEIGHTS} nor an index of several."
        hint = "Choose a repository with a causal language model."
    return RecmasError(problem_at(position, "RM202", message, hint=hint))


def _check_disk(num_bytes: int, repository: str, position: SourcePosition) -> None:
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        message = (
            f"{repository} takes {human_bytes(num_bytes)}, and the disk of {place} has "
            f"{human_bytes(free)} left."
        )
        hint = "Free some space, or set HF_HOME to a folder on a larger disk."
        raise RecmasError(problem_at(position, "RM200", message, hint=hint))


def _reporting_to(advance: Advance) -> type[Any]:
    """Return a class in the place of the library's progress bar that counts megabytes."""
    from tqdm.auto import tqdm

    bytes_left = 0

    class Reported(tqdm):  # type: ignore[misc]  # tqdm is untyped
        def __init__(self, *_: object, initial: int = 0, **__: object) -> None:
            super().__init__(disable=True)
            self.update(initial)  # what an interrupted download left

        def update(self, n: float | None = 1) -> None:
            nonlocal bytes_left
            done, bytes_left = divmod(bytes_left + int(n or 0), _MEGABYTE)
            if done:
                advance(done)

    return Reported


@contextmanager
def _hub_errors(
    repository: str, revision: str, position: SourcePosition, *, download: bool
) -> Iterator[None]:
    """Say what the hub's library raises as errors of ours."""
    try:
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        message = f"finding {repository} needs the package huggingface_hub."
        hint = how_to_install("compile")
        raise RecmasError(problem_at(position, "RM201", message, hint=hint)) from error
    try:
        yield
    except GatedRepoError as error:
        message = f"{repository} is gated: its owner has not let you in."
        hint = (
            f"Accept its terms on https://huggingface.co/{repository} and run `hf auth login` (or "
            "set HF_TOKEN), or choose another."
        )
        raise RecmasError(problem_at(position, "RM202", message, hint=hint)) from error
    except RevisionNotFoundError as error:
        message = f"{repository} has no revision `{revision}`."
        raise missing(position, message, "Use a branch, tag or commit of it.") from error
    except RepositoryNotFoundError as error:
        message = f"there is no repository {repository}, or it is private."
        hint = "Check the name; for a private one run `hf auth login`."
        raise missing(position, message, hint) from error
    except LocalEntryNotFoundError as error:
        where = "in the Hugging Face cache or on the network" if download else "in the local cache"
        message = f"{repository} at {revision} is not {where}."
        hint = f"Download it: hf download {repository} --revision {revision}"
        raise missing(position, message, hint) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        message = f"{repository} at {revision} cannot be fetched: {first_line(error)}"
        hint = "Check the network and the disk, and try again: what is there already is kept."
        raise missing(position, message, hint) from error


def missing(position: SourcePosition, message: str, hint: str) -> RecmasError:
    """Return that a backbone is not there, RM200."""
    return RecmasError(problem_at(position, "RM200", message, hint=hint))


def no_safetensors(position: SourcePosition, what: str, file: str) -> RecmasError:
    """Return that a model has its weights in a file of another form only, RM202."""
    message = f"{what} has its weights in {file} and in no safetensors file."
    hint = (
        "recmas reads safetensors only. Convert it where you trust it: load it with "
        "transformers and call `save_pretrained`, which writes safetensors."
    )
    return RecmasError(problem_at(position, "RM202", message, hint=hint))
