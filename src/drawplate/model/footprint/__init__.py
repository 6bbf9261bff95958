"""What one layer, and what surrounds the layers, does to memory: measured without data."""
