"""Pages that show what a run gave: figures, charts and images in one HTML file that needs nothing else."""
