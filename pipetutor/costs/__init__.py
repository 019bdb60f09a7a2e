"""What a layer costs here in time and memory, and the cut that follows."""
