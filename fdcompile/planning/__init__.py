"""Chooses key steps, cut and forecast weights for a pipeline by measuring its own calls."""
