"""GGUF files of llama.cpp's: what they say, the tokenizer they describe, their weights."""
