"""Where a latent step's time goes, and how much of it is beyond our reach.

    python benchmarks/step_parts.py BUNDLE [BUNDLE ...] [--rows 1,8] [--used 64] [--capacity 512]
        [--threads N] [--turns 60] [--json FILE]

Takes a backbone's decoder for the CPU apart: its products with weights are a graph of their own,
its attention is another, both with the very inputs that they have in a step. ONNX Runtime's kernels
take that time whatever stands around them; the rest is what all other operators and the calls of
them take. The whole step and its parts run in turn. Prints a Markdown table: medians in
milliseconds, quartiles of the whole step, nodes, and the share of the floor (reading the step's
weights once) of the whole step and of the products alone, which is the most that the step could
reach. A bundle takes some ten seconds. With `--threads 1` times are those of the processor, which
others on the machine change little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from recmas_compiler.bench.engine_worker import weight_bytes, weight_precision
from recmas_compiler.bench.engines import host_reader
from recmas_runtime.checking.machine import describe_machine
from recmas_runtime.engines.onnx.session import physical_cores
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.layers import PROMPT_BRANCH

Arrays = Mapping[str, NDArray[Any]]

PRODUCTS: Final = frozenset({"MatMul", "Gemm", "MatMulNBits", "MatMulIntegerToFloat", "QMoE"})
ATTENTION: Final = frozenset({"GroupQueryAttention", "Attention"})
WARM_UP: Final = 5
_ERRORS_ONLY: Final = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rows", type=numbers, default=[1, 8])
    parser.add_argument("--used", type=int, default=64, help="positions that are cached already")
    parser.add_argument("--capacity", type=int, default=512)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not 0 < arguments.used < arguments.capacity:
        parser.error("--used is at least 1 and below --capacity")

    found = [
        {"bundle": str(bundle), "backbone": name, **row}
        for bundle in arguments.bundles
        for name, decoder in decoders(bundle).items()
        for row in measure(decoder, arguments)
    ]
    figures = {
        "date": date.today().isoformat(),
        "machine": f"{describe_machine()['cpu']}, {arguments.threads} threads",
        "used": arguments.used,
        "rows": found,
    }
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def numbers(text: str) -> list[int]:
    """Return positive numbers that commas separate."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a step has at least one row")
    return found


def decoders(bundle: Path) -> dict[str, Path]:
    """Return the decoder that each backbone of a bundle has on the CPU."""
    opened = open_bundle(bundle)
    entries = opened.manifest.backbones.items()
    return {name: opened.file(entry.cpu_decoder or entry.decoder) for name, entry in entries}


def measure(decoder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time a decoder's whole step and its parts in turn, for every number of rows."""
    step = step_of(decoder)
    folder, threads = decoder.parent, arguments.threads
    chosen = {"products": products(step), "attention": attention(step)}
    parts = {name: part_of(step, nodes) for name, nodes in chosen.items() if nodes}
    names = {i.name for part in parts.values() for i in part.graph.input}
    sessions = {name: open_graph(part, folder, threads) for name, part in parts.items()}
    whole, num_bytes = open_graph(step, folder, threads), weight_bytes(decoder)
    read = host_reader(num_bytes, threads=threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    rows = []
    for batch in arguments.rows:
        given = inputs(whole, batch, used=arguments.used, capacity=arguments.capacity)
        inside = {**given, **inner_values(step, folder, names - given.keys(), given)}
        calls = {"step": bound(whole, given)}
        calls |= {name: bound(session, inside) for name, session in sessions.items()}
        times: dict[str, list[float]] = {"floor": [], **{name: [] for name in calls}}
        for turn in range(WARM_UP + arguments.turns):
            seconds = {name: timed(call, clock) for name, call in calls.items()}
            seconds["floor"] = read()
            if turn >= WARM_UP:
                for name, value in seconds.items():
                    times[name].append(1e3 * value)
        rows.append(
            {
                "precision": weight_precision(decoder),
                "batch": batch,
                "nodes": len(step.graph.node),
                "megabytes": num_bytes / 1e6,
                "quartiles_ms": statistics.quantiles(times["step"], n=4)[::2],
                **{f"{name}_ms": statistics.median(values) for name, values in times.items()},
                # The fastest of several reads is what memory can do.
                "floor_ms": statistics.quantiles(times["floor"], n=10)[0],
            }
        )
    return rows


def step_of(decoder: Path) -> onnx.ModelProto:
    """Return what a decoder computes for one position, without a choice of branches."""
    model = onnx.load(str(decoder), load_external_data=False)
    for node in list(model.graph.node):
        branches = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
        steps = [branch for branch in branches if branch.name != PROMPT_BRANCH]
        if node.op_type == "If" and len(steps) < len(branches):
            (branch,) = steps
            model.graph.node.remove(node)
            model.graph.node.extend(branch.node)
            for old, new in zip(node.output, branch.output, strict=True):
                model.graph.node.append(helper.make_node("Identity", [new.name], [old]))
    return model


def products(step: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes that multiply with weights; links, which are inputs, are not among them."""
    weights = {tensor.name for tensor in step.graph.initializer if len(tensor.dims) > 1}
    nodes = [node for node in step.graph.node if node.op_type in PRODUCTS]
    return [node for node in nodes if weights.intersection(node.input)]


def attention(step: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes that attend."""
    return [node for node in step.graph.node if node.op_type in ATTENTION]


def part_of(step: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """Return a graph of some nodes of another, each by itself: what it reads is given."""
    stored = {tensor.name: tensor for tensor in step.graph.initializer}
    read = dict.fromkeys(name for node in nodes for name in node.input if name)
    graph = helper.make_graph(
        nodes,
        "part",
        [helper.make_empty_tensor_value_info(name) for name in read if name not in stored],
        [helper.make_empty_tensor_value_info(n) for node in nodes for n in node.output if n],
        [stored[name] for name in read if name in stored],
    )
    types = {name: kind for node in nodes for name, kind in _element_types(node).items()}
    for value in graph.input:
        value.type.tensor_type.elem_type = types.get(value.name, onnx.TensorProto.FLOAT)
    part = helper.make_model(graph, opset_imports=step.opset_import)
    part.ir_version = step.ir_version
    return part


def _element_types(node: onnx.NodeProto) -> dict[str, int]:
    """Return those of a node's inputs that are no float32 numbers."""
    if node.op_type == "MatMulIntegerToFloat":
        return {node.input[0]: onnx.TensorProto.UINT8}
    if node.op_type == "GroupQueryAttention":
        return dict.fromkeys(node.input[5:7], onnx.TensorProto.INT32)
    if node.op_type == "Attention" and len(node.input) > 3:
        return {node.input[3]: onnx.TensorProto.BOOL}
    return {}


def open_graph(model: onnx.ModelProto, folder: Path, threads: int) -> ort.InferenceSession:
    """Open a graph whose weights lie in a folder, as the runtime does."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, _ERRORS_ONLY
    options.add_session_config_entry("session.force_spinning_stop", "1")
    key = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(key, str(folder.resolve()))
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def inputs(session: ort.InferenceSession, batch: int, *, used: int, capacity: int) -> Arrays:
    """Return random inputs of a step behind so many cached rows, with a link of full width."""
    draw = np.random.default_rng(0)
    sizes = {"batch": batch, "positions": 1, "capacity": capacity, "groups": 1, "link_hidden": 1}
    found: dict[str, NDArray[Any]] = {}
    for given in session.get_inputs():
        shape = [size if isinstance(size, int) else sizes[size] for size in given.shape]
        if given.type == "tensor(int64)":
            found[given.name] = np.full(shape, used if given.name == "write_index" else 0)
        elif given.type == "tensor(bool)":
            found[given.name] = np.zeros(shape, np.bool_)
        else:
            found[given.name] = 0.05 * draw.standard_normal(shape, np.float32)
    return found


def inner_values(
    step: onnx.ModelProto, folder: Path, names: set[str], given: Arrays
) -> dict[str, NDArray[Any]]:
    """Return what a step computes on its way, by name."""
    looked_at = onnx.ModelProto()
    looked_at.CopyFrom(step)
    known = {value.name for value in step.graph.output}
    wanted = sorted(names)
    looked_at.graph.output.extend(
        helper.make_empty_tensor_value_info(name) for name in wanted if name not in known
    )
    session = open_graph(looked_at, folder, threads=1)
    return dict(zip(wanted, session.run(wanted, dict(given)), strict=True))


def bound(session: ort.InferenceSession, arrays: Arrays) -> Callable[[], Any]:
    """Return a call with inputs bound once, and caches written where they are read."""
    binding, held = session.io_binding(), {}
    for given in session.get_inputs():
        held[given.name] = ort.OrtValue.ortvalue_from_numpy(
            np.ascontiguousarray(arrays[given.name])
        )
        binding.bind_ortvalue_input(given.name, held[given.name])
    for output in session.get_outputs():
        cache = output.name.rpartition("present_")[2]  # a branch has names with a prefix
        if cache != output.name and cache in held:
            binding.bind_ortvalue_output(output.name, held[cache])
        else:
            binding.bind_output(output.name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def timed(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Return the seconds that a call takes by a clock."""
    start = clock()
    call()
    return clock() - start


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table, one line a bundle, backbone and number of rows."""
    head = ["backbone", "precision", "rows", "nodes", "MB", "step, ms", "products", "attention"]
    head += ["rest", "floor", "of the floor", "products alone"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        step, floor, product = row["step_ms"], row["floor_ms"], row["products_ms"]
        attended = row.get("attention_ms", 0.0)
        low, high = row["quartiles_ms"]
        lines.append(
            [
                *(row["backbone"], row["precision"], str(row["batch"]), str(row["nodes"])),
                *(f"{row['megabytes']:.0f}", f"{step:.2f} ({low:.2f} to {high:.2f})"),
                *(f"{product:.2f}", f"{attended:.2f}", f"{step - product - attended:.2f}"),
                *(f"{floor:.2f}", f"{floor / step:.0%}", f"{floor / product:.0%}"),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
