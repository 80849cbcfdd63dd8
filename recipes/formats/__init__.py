"""What `recipes.formatting` is made of: reading files by line, one converter a schema, the tasks, the report."""
