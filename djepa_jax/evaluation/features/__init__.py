"""Networks that turn pictures into the vectors that metrics compare."""
