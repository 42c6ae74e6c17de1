"""Factors outside transformers: a vLLM plugin, checkpoints that need no library, mlx-lm, and a check of a server."""
