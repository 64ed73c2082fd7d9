"""A checkpoint in the published layout, filled by a fixed rule, and what the published network computes with it."""
