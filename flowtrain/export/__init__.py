"""A flow as a program or a file that needs no flowtrain: plain modules of it, their traces, and the formats."""
