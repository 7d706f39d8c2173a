"""Compile, cache, load and launch: everything between source text and a kernel that has run."""
