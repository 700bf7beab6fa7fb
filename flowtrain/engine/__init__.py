"""Training, evaluation and their records. Knows flows and data, but no configuration."""
