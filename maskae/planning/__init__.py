"""What a run would need on accelerators that are not here: memory, FLOPs, bytes and collectives per chip, and what limits the step."""
