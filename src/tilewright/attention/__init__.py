"""The attention engine: variants, views of KV caches, plans, states, and the kernels that run them."""
