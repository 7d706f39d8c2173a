"""What people run: command line, benchmarks, viewers. Imports all rooms, imported by none."""
