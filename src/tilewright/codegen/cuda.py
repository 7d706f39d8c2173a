"""CUDA C++ for NVRTC."""
def headers(): return {}
def render(program, declared): raise NotImplementedError
