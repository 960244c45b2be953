"""Who races: every peer at every precision that it has, the files it runs on, and the cells."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from recmas_runtime.formats.bundle import open_bundle

Precision = Literal["float32", "int8", "int4"]
PRECISIONS: Final[tuple[Precision, ...]] = ("float32", "int8", "int4")

RECMAS: Final = "recmas"
LLAMA: Final = "llama.cpp"
OPENVINO: Final = "OpenVINO GenAI"
GENAI: Final = "ORT GenAI"
TRANSFORMERS: Final = "transformers"
PEERS: Final = (RECMAS, LLAMA, OPENVINO, GENAI, TRANSFORMERS)

# The folder of each peer's packages; without one they are this program's own.
ENVIRONMENTS: Final = {LLAMA: "llama.cpp", OPENVINO: "openvino", GENAI: "onnxruntime-genai"}
# Their packages stand before those of this program, which they see as well.
SHARES_PACKAGES: Final = frozenset({GENAI})

ADAPTERS: Final = {
    RECMAS: "recmas_peer",
    LLAMA: "llama_peer",
    OPENVINO: "openvino_peer",
    GENAI: "genai_peer",
    TRANSFORMERS: "transformers_peer",
}


@dataclass(frozen=True, kw_only=True)
class GgufType:
    """A type of GGUF file; `number` is that of llama.cpp's enum of file types.

    Attributes:
        raced: Whether llama.cpp races with it; one that does not is for another peer.
    """

    name: str
    number: int
    precision: Precision
    raced: bool = True


GGUF_TYPES: Final = (
    GgufType(name="F32", number=0, precision="float32"),
    # OpenVINO's reader takes no matrices in float32, and computes in it on those in float16.
    GgufType(name="F16", number=1, precision="float32", raced=False),
    GgufType(name="Q8_0", number=7, precision="int8"),
    GgufType(name="Q4_0", number=2, precision="int4"),
    GgufType(name="Q4_1", number=3, precision="int4"),
)
# OpenVINO's own advice is these two types of quantized files.
OPENVINO_TYPES: Final = ("F16", "Q8_0", "Q4_0")
GENAI_PRECISIONS: Final[Mapping[Precision, str]] = {
    "float32": "fp32",
    "int8": "int8",
    "int4": "int4",
}


@dataclass(frozen=True, kw_only=True)
class Models:
    """The files of one set of weights, below one folder.

    Attributes:
        source: The GGUF file that all others are made of.
        own_type: Its type, which is raced as it is.
    """

    folder: Path
    source: Path
    own_type: str

    def gguf(self, name: str) -> Path:
        return self.source if name == self.own_type else self.folder / f"{name}.gguf"

    def openvino(self, name: str) -> Path:
        return self.folder / f"openvino-{name}"

    def genai(self, precision: Precision) -> Path:
        return self.folder / f"genai-{precision}"

    def genai_body(self, precision: Precision) -> Path:
        return self.folder / f"genai-{precision}-body"

    @property
    def hugging_face(self) -> Path:
        return self.folder / "hf"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One file in one peer.

    Attributes:
        file: What it loads.
        made: How that came about.
        step_graph: The ONNX graph of its latent step, whose weights count as read; None where the
            adapter tells the bytes itself.
    """

    peer: str
    precision: Precision
    form: str
    file: Path
    made: str
    options: Mapping[str, Any]
    step_graph: Path | None = None

    @property
    def name(self) -> str:
        """Return the name it goes by in files and tables."""
        return f"{self.peer} {self.form}"

    def command(self, environments: Path) -> list[str]:
        python = sys.executable
        if self.peer in ENVIRONMENTS:
            python = str(environments.absolute() / ENVIRONMENTS[self.peer] / "bin/python")
        return [python, str(WORKER), ADAPTERS[self.peer]]


WORKER: Final = Path(__file__).parent / "adapters/peer_worker.py"
QUANTIZER: Final = "llama_model_quantize of llama-cpp-python"


def contenders_of(
    models: Models, bundles: Mapping[Precision, Path], *, threads: int
) -> list[Contender]:
    """Return everyone on one set of weights, by precision and then by peer."""
    found = [_bundle(path, precision, threads) for precision, path in bundles.items()]
    for kind in GGUF_TYPES:
        path = models.gguf(kind.name)
        made = f"{QUANTIZER}, {kind.name}" if path != models.source else "as it came"
        if kind.raced:
            found.append(
                Contender(
                    peer=LLAMA,
                    precision=kind.precision,
                    form=kind.name,
                    file=path,
                    made=made,
                    options={"gguf": str(path.absolute()), "threads": threads},
                )
            )
        if kind.name in OPENVINO_TYPES:
            folder = models.openvino(kind.name)
            # Otherwise it takes bfloat16 where the processor has that.
            exact = "f32" if kind.precision == "float32" else None
            found.append(
                Contender(
                    peer=OPENVINO,
                    precision=kind.precision,
                    form=kind.name,
                    file=folder,
                    made=f"OpenVINO GenAI's reader of GGUF, of {kind.name}",
                    options={
                        "folder": str(folder.absolute()),
                        "threads": threads,
                        "inference_precision": exact,
                    },
                )
            )
    for precision, name in GENAI_PRECISIONS.items():
        folder, body = models.genai(precision), models.genai_body(precision)
        found.append(
            Contender(
                peer=GENAI,
                precision=precision,
                form=name,
                file=folder,
                made=f"onnxruntime-genai's builder, -p {name}, of the weights in float32",
                options={
                    "folder": str(folder.absolute()),
                    "body": str((body / "model.onnx").absolute()),
                    "every": str((folder / "every.onnx").absolute()),
                    "threads": threads,
                },
                step_graph=body / "model.onnx",
            )
        )
    found.append(
        Contender(
            peer=TRANSFORMERS,
            precision="float32",
            form="eager",
            file=models.hugging_face,
            made="transformers' reader of GGUF, in float32",
            options={"folder": str(models.hugging_face.absolute()), "threads": threads},
        )
    )
    order = {peer: place for place, peer in enumerate(PEERS)}
    return sorted(found, key=lambda c: (PRECISIONS.index(c.precision), order[c.peer]))


def _bundle(path: Path, precision: Precision, threads: int) -> Contender:
    bundle = open_bundle(path, verify_hashes=False)
    backbone = bundle.plan.agents[bundle.plan.answer_agent].backbone
    entry = bundle.manifest.backbones[backbone]
    if entry.precision != precision:
        raise SystemExit(f"{path} is in {entry.precision}, not in {precision}")
    return Contender(
        peer=RECMAS,
        precision=precision,
        form=precision,
        file=path,
        made=f"recmasc build, build.precision={precision}",
        options={"bundle": str(path.absolute()), "threads": threads},
        step_graph=bundle.file(entry.decoder),
    )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What everyone is asked in turn; `rows` are those of a latent step."""

    name: str
    request: Mapping[str, Any]
    rows: int = 0


ROWS: Final = (1, 2, 4, 8, 16, 32)
USED: Final = 128
PROMPTS: Final = (128, 512)
TEXT_TOKENS: Final = 64
TEXT: Final = "text"
LOAD: Final = "load"


def prompt_cell(positions: int) -> Cell:
    return Cell(name=f"prompt-{positions}", request={"do": "prompt", "positions": positions})


def rows_cell(rows: int) -> Cell:
    """Return the cell of a latent step; fewer steps where each takes longer."""
    count = 32 if rows == 1 else 16 if rows <= 8 else 8
    request = {"do": "steps", "rows": rows, "used": USED, "count": count}
    return Cell(name=f"rows-{rows}", request=request, rows=rows)


def cells_of(*, quick: bool) -> list[Cell]:
    """Return the cells; what needs more models, or more memory, comes behind the text."""
    rows = (1, 8) if quick else (1, 8, *(n for n in ROWS if n not in (1, 8)))
    text = Cell(name=TEXT, request={"do": "text", "used": USED, "count": TEXT_TOKENS})
    return [*map(prompt_cell, PROMPTS), text, *map(rows_cell, rows)]
