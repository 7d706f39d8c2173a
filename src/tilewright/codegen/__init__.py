"""From the loop level to source text: one C-family renderer, C++ and CUDA on top of it."""
