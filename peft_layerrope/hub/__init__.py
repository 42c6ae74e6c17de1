"""Adapters to the Hub and back."""
