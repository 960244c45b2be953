"""From a record to token ids and back: templates, tokenizers, sampling."""
