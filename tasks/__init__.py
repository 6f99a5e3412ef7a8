"""Lifecycle stages: each turns input artifacts into one output artifact."""
