"""The two sides of tools/bench_peers.py, each a process of its own: torch and jax would fight for one process's threads."""
