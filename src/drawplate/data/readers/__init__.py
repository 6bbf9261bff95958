"""Files of any kind -> rows of text, each with where it came from."""
