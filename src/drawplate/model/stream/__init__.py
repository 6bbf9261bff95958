"""What moves between host memory and the device while layers run."""
