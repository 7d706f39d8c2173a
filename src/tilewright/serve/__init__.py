"""Serves language models: model files and prompts in, text out.

`weights` and `gguf` open model files, `blocks` has the layouts of quantised weights, `tokenizer`
and `text` convert text to tokens and back, `chat` renders messages as a prompt. `models` has the
layers; `runner` runs a batch, which `scheduler` decides, over the pages of `kv_pool` and `prefix`;
`sampler` chooses tokens. `engine` joins them for programs, `api` for HTTP.
"""
