"""Types for annotations: type checkers reject a misspelt direction, and run-time checks read the
same lists.
"""

from typing import Literal, Protocol

Direction = Literal["policy||reference", "reference||policy"]
Estimator = Literal["k1", "k2", "k3", "abs"]
BinaryKind = Literal["kl", "tv"]
DivergenceName = Literal["kl", "js", "skew_kl", "renyi", "total_variation", "jeffreys"]
DistillationDirection = Literal["teacher||student", "student||teacher"]
Reduction = Literal["none", "mean", "token_mean", "sum"]  # "token_mean" is an alias of "mean"
PenaltyReduction = Literal["token_mean", "mean", "sequence_mean", "sum"]


class BetaController(Protocol):
    """An object whose `beta` is read at every call, such as a controller of fastkl.rl."""

    @property
    def beta(self) -> float:
        """The current weight."""
