"""The step-cost table of one GPU."""
