"""The parts of `recipes.formatting`: readers of files, the table of schemas, converters, checks and reports.

Data knows no model: it imports `recipes.cli.errors` and `recipes.cli.screen`.
"""
