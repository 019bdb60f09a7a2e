"""What lessons alone need."""
