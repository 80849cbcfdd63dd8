"""The parts of `recipes.formatting`: readers of files, the table of schemas, converters, checks and reports.

Files here import each other and `recipes.cli.errors`, and nothing else of `recipes`: data knows no model.
"""
