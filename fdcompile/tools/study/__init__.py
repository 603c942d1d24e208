"""Measures how a UNet's features change from step to step, as in Section 3.2 of the paper, for any model."""
