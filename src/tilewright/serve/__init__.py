"""Serves a language model: model files and prompts in, text out.

`weights` and `gguf` open model files, `blocks` has the layouts of quantised weights, `tokenizer`
converts text to tokens and back, `chat` renders messages as a prompt, `model` runs the kernels,
`engine` generates answers.
"""
