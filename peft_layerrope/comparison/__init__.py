"""Contenders on the same examples: baselines, adapters, and what is written of them."""
