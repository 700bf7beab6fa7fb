"""The command line: composes and checks a configuration, then starts the job. Imports no torch."""
