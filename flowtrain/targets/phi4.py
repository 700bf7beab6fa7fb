"""The scalar field φ⁴ on a lattice."""

from __future__ import annotations

from flowtrain.targets.target import Target


class Phi4(Target):
    """φ⁴ theory in two dimensions on a periodic lattice of side × side, row by row in one vector: log p = −S with the
    action S = Σₓ 4φₓ² − 2φₓ·(φ of its right + φ of its lower neighbour) + m²φₓ² + λφₓ⁴ (Albergo, Kanwar and Shanahan
    2019, equation 15). log Z is not known.

    Args:
        side: sites of a side of the lattice.
        mass: m², the squared mass, below 0 for the double well.
        coupling: λ. The default values are those of that paper's smallest lattice, in the symmetric phase.

    Raises:
        ValueError: ``side`` below 2, or ``coupling`` not above 0.

    >>> import torch
    >>> Phi4(6).log_prob(torch.ones(1, 36))  # a constant field has no gradient: −36 (m² + λ)
    tensor([-107.1000])
    """

    name = "phi4"

    def __init__(self, side: int = 6, mass: float = -4.0, coupling: float = 6.975):
        if side < 2:
            raise ValueError(f"side={side} must be at least 2")
        if not coupling > 0:
            raise ValueError(f"coupling={coupling} must be above 0")
        self.side, self.mass, self.coupling, self.dimensions = side, mass, coupling, side**2
        self.names = tuple(f"phi_{row}_{column}" for row in range(side) for column in range(side))

    def log_prob(self, x):
        field = x.unflatten(1, (self.side, self.side))
        squares = field.square()
        neighbours = field * (field.roll(-1, 1) + field.roll(-1, 2))
        action = (4 + self.mass) * squares - 2 * neighbours + self.coupling * squares.square()
        return -action.flatten(1).sum(1)
