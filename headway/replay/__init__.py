"""Traces against real services: prompts made from a trace's blocks, sent at its times, and what the clients saw."""
