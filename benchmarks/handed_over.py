"""Compare answers behind handed-over cache rows with a plain transformers computation.

    python benchmarks/handed_over.py BUNDLE SPEC --data FILE.jsonl [--limit 20] [--threads N]

BUNDLE was built of SPEC, whose links all carry cache rows of whole turns to the answer agent, on
one backbone. The plain computation knows neither: each sender's conversation is written by the
tokenizer's own chat template without the generation prompt, and read once, with positions that go
on where the sender before it ended and without a look at that sender; the answer agent's prompt is
read behind these `past_key_values`, and greedy tokens are taken until the turn ends. FILE has
records as `recmasc data` writes them. Prints both texts where they differ.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache

import recmas_compiler as rc
import recmas_runtime as rt
from recmas_compiler.lowering.reference import load_backbones
from recmas_runtime.core.jsonl import read_json_lines
from recmas_runtime.core.progress import Silent

SLOT: Final = re.compile(r"\{\{ *latent\.(\w+) *\}\}")
FIELD: Final = re.compile(r"\{\{ *(\w+)(?:\[(\d+)\])? *\}\}")
PLACE: Final = "@@slot@@"
# System text, if any, and prompt.
Turn = tuple[str | None, str]


def filled(turn: Turn, record: Mapping[str, Any]) -> Turn:
    """Return a turn with the record's fields in it, and a mark in place of each slot."""

    def value(found: re.Match[str]) -> str:
        whole = record[found[1]]
        return str(whole if found[2] is None else whole[int(found[2])])

    system, text = turn
    asked = FIELD.sub(value, SLOT.sub(PLACE, text.strip()))
    return None if system is None else FIELD.sub(value, system.strip()), asked


def turn_ids(tokenizer: Any, turn: Turn, *, asked: bool) -> list[int]:
    """Return the token ids of a conversation of one turn; what a slot splits is tokenized apart."""
    given = (("system", turn[0]), ("user", turn[1]))
    talk = [{"role": role, "content": text} for role, text in given if text is not None]
    rendered = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=asked)
    pieces = (tokenizer(piece, add_special_tokens=False) for piece in rendered.split(PLACE))
    return [token for piece in pieces for token in piece.input_ids]


@torch.no_grad()
def plain_answer(
    model: Any, tokenizer: Any, senders: Sequence[Turn], asked: Turn, *, most: int
) -> str:
    """Return the greedy answer to `asked` behind the rows of the senders' turns."""
    rows: list[list[tuple[Tensor, Tensor]]] = []
    at = 0
    for turn in senders:
        ids = torch.tensor([turn_ids(tokenizer, turn, asked=False)])
        places = torch.arange(at, at + ids.shape[1])[None]
        cache = model(ids, position_ids=places, use_cache=True).past_key_values
        rows.append([(layer.keys, layer.values) for layer in cache.layers])
        at += ids.shape[1]
    joined = DynamicCache()
    for number, layers in enumerate(zip(*rows, strict=True)):
        keys, values = zip(*layers, strict=True)
        joined.update(torch.cat(keys, 2), torch.cat(values, 2), number)
    ids = torch.tensor([turn_ids(tokenizer, asked, asked=True)])
    written: list[int] = []
    ends = {tokenizer.eos_token_id}
    while len(written) < most:
        logits = model(ids, past_key_values=joined, use_cache=True).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
        ids = torch.tensor([[token]])
    return str(tokenizer.decode(written)).strip()


def main() -> None:
    """Ask the same records both ways and count equal texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    records = list(read_json_lines(arguments.data))[: arguments.limit]
    spec = rc.load_spec(arguments.spec)
    (backbone,) = load_backbones(rc.compile(spec).graph, progress=Silent()).values()
    turns = {name: (a.system, a.prompt.then) for name, a in spec.document.agents.items()}
    asked, most = turns[spec.document.answer.agent], spec.document.answer.max_new_tokens
    names = SLOT.findall(asked[1])

    with rt.load(arguments.bundle, threads=arguments.threads) as system:
        answers = system.run_batch(records)
    equal = 0
    for record, answer in zip(records, answers, strict=True):
        senders = [filled(turns[name], record) for name in names]
        turn = filled(asked, record)
        plain = plain_answer(backbone.model, backbone.tokenizer, senders, turn, most=most)
        ours = repr(answer) if isinstance(answer, rt.RecmasError) else answer.answer.strip()
        equal += ours == plain
        if ours != plain:
            print(f"{record['id']}: {ours!r}, plain {plain!r}")
    print(f"{equal} of {len(records)} greedy answers equal")
    sys.exit(equal < len(records))


if __name__ == "__main__":
    main()
