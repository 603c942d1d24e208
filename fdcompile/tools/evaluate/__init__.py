"""Compares variants of a pipeline: what they cost and how good their pictures are (Tables 1 to 3, 6 and 7)."""
