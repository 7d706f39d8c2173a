"""Doors to other systems, imported by name: `compat` (FlashInfer's calls), `torch_ops` (operators
for torch.compile), `hf` (attention of Hugging Face transformers)."""
