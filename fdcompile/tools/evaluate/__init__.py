"""Compares variants of a pipeline: what they cost and how good their images are (Tables 1 to 3, 6 and 7)."""
