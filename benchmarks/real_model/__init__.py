"""A real base and real people's preferences through the three recipes: `python -m benchmarks.real_model --help`."""
