"""Times and sizes as people write them."""


def format_seconds(seconds: float) -> str:
    """A duration as people write it: 42 s, 3 min 05 s, 2 h 07 min."""
    seconds = round(max(seconds, 0))
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_bytes(size: float) -> str:
    """A size with three digits or so: 512 B, 3.2 MiB, 79 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
