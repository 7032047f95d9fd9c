"""What is said to the person at the graph when a job cannot be done."""


class Refusal(ValueError):
    """A job, an input or a file that cannot be used, said before any heavy work.

    Attributes:
        problem: the value and the rule it breaks, a sentence without its full stop.
        fix: what to do about it, likewise.
    """

    def __init__(self, problem: str, fix: str):
        super().__init__(f"{problem}. {fix}.")
        self.problem = problem
        self.fix = fix

    def about(self, what: str) -> "Refusal":
        """The same with the name of a file or a node in front."""
        return type(self)(f"{what}: {self.problem}", self.fix)
