"""Threads for small host-side linear algebra."""

from __future__ import annotations

from threadpoolctl import threadpool_limits

# About where a second thread begins to pay for its synchronisation.
SMALL_VALUES = 2**24


def limited_threads(values: int) -> threadpool_limits:
    """A context in which BLAS and OpenMP use one thread if the matrix has few `values`, else as many as ever.

    Their threads spin while they wait: next to JAX's own threads on a busy machine, a 10 ms logistic regression took 3 s.
    """
    return threadpool_limits(limits=1 if values < SMALL_VALUES else None)
