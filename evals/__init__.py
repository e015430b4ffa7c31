"""lm-eval tasks, grading, statistics and the comparison against baselines."""
