"""The regression gate: exact figures, fidelity and time of a pipeline, compared with a stored baseline."""
