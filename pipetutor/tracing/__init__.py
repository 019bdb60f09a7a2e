"""What every rank did and when: clocks, recording, and traces read back."""
