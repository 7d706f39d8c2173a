"""Benchmarks: suites, their peers and synthetic graphs. `python3 dev.py bench SUITE …` runs one."""
