"""From inputs of any kind to clean, parsed documents: read, decode, normalise, judge, parse, hash."""
