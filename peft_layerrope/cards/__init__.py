"""Model cards: what they say, and how ours meets what people wrote."""
