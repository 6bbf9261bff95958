"""What the plan and the runtime must agree on, said once and free of torch."""
