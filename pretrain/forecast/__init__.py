"""Before a run: the memory of a rank, the bytes on the wire, and the time, for any number of GPUs."""
