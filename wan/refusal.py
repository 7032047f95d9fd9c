"""What is said to the person at the graph when a job cannot be done."""

import re

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """A text that any log takes: control characters and halves of surrogate pairs as escapes.

    Names of files whose bytes are no UTF-8, and names in files, may hold them. A log in UTF-8 raises on such
    a half, and with it the thread that writes there.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Refusal(ValueError):
    """A job, an input or a file that cannot be used, said before any heavy work.

    Attributes:
        problem: the value and the rule it breaks, a sentence without its full stop.
        fix: what to do about it, likewise.
    """

    def __init__(self, problem: str, fix: str):
        problem, fix = printable(problem), printable(fix)
        super().__init__(f"{problem}. {fix}.")
        self.problem = problem
        self.fix = fix

    def about(self, what: str) -> "Refusal":
        """The same with the name of a file or a node in front."""
        return type(self)(f"{what}: {self.problem}", self.fix)
