"""Measures variants of a pipeline: repeatable calls, metrics, cost, paired timing, and a report."""
