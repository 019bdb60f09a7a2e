"""What the machine and its libraries give: cores, memory, GPUs, disk; and what a value may be. Loads no torch."""
