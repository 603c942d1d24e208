"""Which steps to compute and how to forecast the others: from a schedule alone, or from inner products of outputs."""
