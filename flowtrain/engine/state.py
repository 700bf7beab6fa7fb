"""What a checkpoint keeps of an object."""

from __future__ import annotations


class Stateful:
    """Keeps the attributes that ``STATE`` names: plain values, or objects with a ``state_dict`` of their own."""

    STATE: tuple[str, ...] = ()

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name) for name in self.STATE}
        return {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError for what ``state`` lacks."""
        for name in self.STATE:
            if hasattr(part := getattr(self, name), "load_state_dict"):
                part.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])
