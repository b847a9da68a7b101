"""Guesses of what comes next, and whether they are worth their rows. How a guess is verified: worker/model_runner.py."""
