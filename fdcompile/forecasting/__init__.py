"""Chooses key steps and forecast weights, from a schedule alone or from inner products of recorded outputs."""
