"""The annotated dataset: survivors with their weights, sketches and segments, and the card that describes them."""
