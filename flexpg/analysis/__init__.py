"""Cost model, reports and plots; imported by reports and benchmarks."""
