"""What an architecture can take part in, found out before weights are read; here it is refused."""
