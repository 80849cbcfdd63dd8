"""What goes wrong through no fault of the code: bad input, a wrong launch, files that do not fit together."""


class UserError(Exception):
    """One clear line: what was found, where, and what to do. Recipes and tools print it and exit with 1."""


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
