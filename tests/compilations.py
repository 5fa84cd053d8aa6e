"""Counting what XLA compiles."""

import contextlib
from collections.abc import Iterator

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that grows by a name for every program that is compiled inside the `with`."""
    names: list[str] = []

    def listen(event: str, seconds: float, **details) -> None:
        if event == COMPILE_EVENT:
            names.append(str(details.get("fun_name", "")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
