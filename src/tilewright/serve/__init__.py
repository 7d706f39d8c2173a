"""Serving a language model: files and tokens in, text out.

`weights` and `gguf` open model files, `blocks` says how raw weights lie, `tokenizer` turns text to
tokens and back, `chat` turns messages to text.
"""
