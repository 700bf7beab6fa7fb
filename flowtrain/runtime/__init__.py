"""What a process lives in: its group, signals, files, and the batch that it shares with others."""
