"""What `recipes.formatting` is made of: readers of files, one schema for each shape of dataset, checks and reports.

Data knows no model: it imports `recipes.cli.errors` and nothing else of `recipes`.
"""
