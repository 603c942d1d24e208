"""Generates images of many prompts, with one process per device: prompts, result store, loop."""
