"""Tools that run on a pipeline: study, evaluate, gate and generate."""
