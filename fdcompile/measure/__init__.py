"""What a variant of a pipeline costs and how close its pictures are: calls, metrics, cost, paired timing, a report."""
