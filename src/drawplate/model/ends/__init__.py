"""What lies before the first layer and after the last: embedding, output head, loss."""
