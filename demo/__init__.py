"""The demonstration: a small model, a corpus that the project wrote, and three queries."""
