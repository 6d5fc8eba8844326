"""The second end of a path brought close to the first one by a permutation of its channels."""

from dataclasses import dataclass
from functools import cached_property

from lmc_lightning.core.objective import Objective
from lmc_lightning.landscape.alignment.activations import activation_matching
from lmc_lightning.landscape.alignment.groups import Groups, groups_of
from lmc_lightning.landscape.alignment.matching import Matching, Method, weight_matching
from lmc_lightning.landscape.paths.line import Endpoint


@dataclass(frozen=True, eq=False)
class Alignment:
    """How states of one module are aligned; its groups of channels are found once for all pairs.

    Attributes:
        method: Whether weights or activations are matched.
        objective: On training examples, with ``mode="eval"``.
        restarts: Further starts of each search.
        seed: Of the restarts, and of the tests of the groups.
    """

    method: Method
    objective: Objective
    restarts: int = 2
    seed: int = 0

    @cached_property
    def groups(self) -> Groups:
        """The permutations that the module allows."""
        return groups_of(self.objective, seed=self.seed)

    def match(self, end_a: Endpoint, end_b: Endpoint) -> Matching:
        """The permutations that bring B close to A."""
        options = {"restarts": self.restarts, "seed": self.seed}
        if self.method == "activations":
            return activation_matching(self.groups, self.objective, end_a, end_b, **options)
        layout = self.objective.layout
        ours, theirs = (layout.unflatten(end.theta) for end in (end_a, end_b))
        return weight_matching(self.groups, ours, theirs, **options)

    def aligned(self, end_a: Endpoint, end_b: Endpoint) -> tuple[Endpoint, Matching]:
        """B after its permutation, and how that was found."""
        matching = self.match(end_a, end_b)
        return matching.apply_to_endpoint(end_b), matching
