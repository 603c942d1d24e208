"""Runs staged programs: locates each step, decides what it runs, and records it."""
