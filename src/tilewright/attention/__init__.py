"""The attention engine: variants, views of KV caches, plans, states, and their kernels."""
