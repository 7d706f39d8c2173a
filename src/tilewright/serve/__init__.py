"""Serves language models: model files and prompts in, text out (docs/design/serving.md)."""
