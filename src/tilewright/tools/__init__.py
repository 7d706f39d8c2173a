"""What people run: command line, viewers, a chat. Imports all rooms, imported by none."""
