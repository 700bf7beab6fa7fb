"""A user's own table: its file read, its columns understood, its rows encoded for a flow and decoded again."""
