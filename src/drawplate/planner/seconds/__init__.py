"""How long a choice takes."""
