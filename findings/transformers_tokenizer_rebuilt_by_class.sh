#!/usr/bin/env bash
# transformers 5.23.0: the class named in tokenizer_config.json decides how text is split, not the
# tokenizer.json beside it. A folder whose tokenizer.json splits numbers into groups of three, and whose
# config names GPT2Tokenizer (as published fine-tunes do), gives other token ids through AutoTokenizer
# than its own tokenizer.json gives through the tokenizers library.
#
# Since version 5 the class takes vocabulary and merges out of tokenizer.json and builds its own
# pre-tokenizer around them; the file's is dropped without a word. With PreTrainedTokenizerFast, or no
# class at all, both agree. Whoever exports `tokenizer.backend_tokenizer` exports the rebuilt one.
#
# Seen: the file [123][456][7], GPT2Tokenizer [12][34][567] or another split, PreTrainedTokenizerFast
# as the file
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet transformers==5.23.0 tokenizers==0.23.3
"$work/venv/bin/python" - "$work/model" <<'PY'
import json
import os
import sys
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
folder.mkdir()
split = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\d{1,3}|\D+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
own = Tokenizer(models.BPE())
own.pre_tokenizer, own.decoder = split, decoders.ByteLevel()
texts = [f"{n:03d} costs {n} dollars" for n in range(1000)] * 3
alphabet = pre_tokenizers.ByteLevel.alphabet()
own.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1300, initial_alphabet=alphabet))
own.save(str(folder / "tokenizer.json"))
(folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def tokens(name):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    return AutoTokenizer.from_pretrained(folder).tokenize("1234567")


by_file = own.encode("1234567").tokens
by_gpt2, by_fast = tokens("GPT2Tokenizer"), tokens("PreTrainedTokenizerFast")
print(f"the file {by_file}, GPT2Tokenizer {by_gpt2}, PreTrainedTokenizerFast {by_fast}")
if by_gpt2 == by_file or by_fast != by_file:
    sys.exit("changed: the named class no longer splits in its own way")
PY
