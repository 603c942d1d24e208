"""What ways to make pictures cost, and how good their pictures are, side by side (Tables 1 to 3, 6 and 7)."""
