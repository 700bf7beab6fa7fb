"""The parts of scripts/gpu, what runs them, and the page that shows what they found."""
