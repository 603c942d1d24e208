"""Is it still what it was? Exact figures, fidelity and time of a pipeline, beside those that were written down."""
