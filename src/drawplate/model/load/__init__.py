"""A checkpoint becomes a model that trains, and is checked against transformers' own."""
