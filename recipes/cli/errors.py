"""How a command ends other than by doing its work: bad input, a wrong launch, a signal, nothing left to do."""


class UserError(Exception):
    """One clear line: what was found, where, and what to do. Recipes and tools print it and exit with 1."""


class RunEnded(Exception):
    """A run that ends in good order before its last line: the sentence to print, and the exit code."""

    def __init__(self, text: str, code: int = 0):
        super().__init__(text, code)
        self.text, self.code = text, code


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
