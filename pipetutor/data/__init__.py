"""The data: fetched or drawn once, and loaded a micro-batch at a time."""
