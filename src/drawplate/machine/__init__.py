"""What this computer is and has: device, memory, speed, caches, and the doctor that looks at them."""
