#!/usr/bin/env bash
# transformers 5.23.0: a tokenizer taken from a GGUF file splits text as tokenizer.ggml.pre says for
# some names only. For others, such as smollm (SmolLM2), it splits as GPT-2 does, without a word.
#
# Expected: a split that is not known is refused, since vocabulary and merges give the model's tokens
# only after the model's split. qwen2 and llama-bpe are known; smollm, which takes digits one by one, is
# not. Ordinary words come out right, so a look at a sentence shows nothing.
#
# Seen: a tokenizer of single digits [1][2][3][4][5][6][7]; from GGUF, called qwen2, the same; called
# smollm or gpt-2, [12][34][56][7]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import json
import logging
import sys

logging.disable(logging.WARNING)
import gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

text = "1234567 costs"
byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
own = Tokenizer(models.BPE())
own.pre_tokenizer, own.decoder = byte_level, decoders.ByteLevel()
texts = [f"{n:03d} costs {n} dollars" for n in range(1000)] * 3
own.train_from_iterator(
    texts, trainers.BpeTrainer(vocab_size=600, initial_alphabet=byte_level.alphabet())
)
# Digits are split off after training, so that merges of digits are there to be misused.
own.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), byte_level]
)
bpe = json.loads(own.to_str())["model"]
vocabulary = sorted(bpe["vocab"], key=bpe["vocab"].get)


def from_gguf(pre):
    writer = gguf.GGUFWriter(f"{pre}.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoTokenizer.from_pretrained(".", gguf_file=f"{pre}.gguf").tokenize(text)


single = own.encode(text).tokens
smollm, gpt2, qwen2 = from_gguf("smollm"), from_gguf("gpt-2"), from_gguf("qwen2")
print(f"itself {single}\nsmollm {smollm}\ngpt-2 {gpt2}\nqwen2 {qwen2}")
if qwen2 != single or smollm != gpt2 or smollm == single:
    sys.exit("changed: the split that a GGUF file names is applied, or refused, for smollm")
PY
