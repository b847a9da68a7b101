"""Guesses of what comes next, and whether they are worth their rows. README.md says how it all goes together."""
