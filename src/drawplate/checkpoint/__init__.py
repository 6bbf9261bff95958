"""A state of training on disk: written so that it is whole or not there, and read back bit for bit."""
