"""Is it better: likelihood, answers, numbers, and a paired comparison of two models on the same rows."""
