"""What people run: the command line, benchmarks and viewers. Imports all rooms, imported by none."""
