"""Scores examples: the likelihood of the answer in one forward pass, or what the model writes; by position."""
