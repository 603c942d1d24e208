"""What a user runs on a pipeline: study, evaluate, the regression gate, generate."""
