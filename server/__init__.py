"""The server and the explorer in front of it."""
