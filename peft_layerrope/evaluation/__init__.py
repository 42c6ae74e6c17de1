"""Scores examples in one forward pass, or by what the model writes; scores by position, with intervals."""
