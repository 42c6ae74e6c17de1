"""The search: simple choices, a factor for each layer under a bound on harm, and the held-out table."""
