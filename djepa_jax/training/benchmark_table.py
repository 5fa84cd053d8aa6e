"""What `benchmark.py` has measured, as a table for people."""

from collections.abc import Sequence


def report(results: dict, parts: Sequence[str]) -> str:
    """The results of `parts` as a table for people."""
    config = results["config"]
    cuts = (f"{s['start']}-{s['stop']} ({s['visible']} + {s['new']})" for s in results["segments"])
    devices = f"{results['devices']} x {results['device']} ({results['platform']})"
    rows = [
        ("device", f"{devices}, mesh {_pairs(results['mesh'])}"),
        ("versions", _pairs(results["versions"])),
        ("XLA_FLAGS", results["XLA_FLAGS"] or "none"),
        ("compilation cache", results["compilation_cache"]),
        ("precision", config["compute_dtype"]),
        ("model", _pairs(config["model"])),
        ("loss", _pairs(config["loss"])),
        ("sample", _pairs(config["sample"])),
        ("segments", f"{', '.join(cuts)}: steps (visible + new tokens)"),
    ]
    for part in parts:
        rows += [("", ""), *part_rows(part, results[part])]
    return "\n".join(f"{name:<20}{text}".rstrip() for name, text in rows)


def _pairs(values: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def part_rows(part: str, record: dict) -> list[tuple[str, str]]:
    """Rows of the table for one part."""
    ms, used, mfu = record["milliseconds"], record["memory_bytes"], record["useful_mfu"]
    counts, unit = record["flops"], record["unit"]
    runs = f"{len(record['seconds'])} repeats of {record['calls_per_repeat']}"
    spread = f"10 % {ms['p10']:.1f}, 90 % {ms['p90']:.1f}, least {ms['min']:.1f}; {runs}"
    planned, peak = (
        f"{used[key] / 2**20:,.0f} MiB" if used[key] else "not known"
        for key in ("xla_plan", "device_peak")
    )
    compiled, lowered = record["compile_seconds"], record["lower_seconds"]
    per_image = f"{record['milliseconds_per_image']:.2f} ms an image"

    def times(name: str, other: str) -> str:
        value = counts[name]
        known = value is not None
        return f"{readable(value)}, {value / counts[other]:.3f} x {other}" if known else "not known"

    return [
        (part, f"batch {record['batch_size']}"),
        ("compile", f"{compiled:.1f} s, after {lowered:.1f} s of tracing and lowering"),
        ("time", f"{ms['median']:.1f} ms a {unit} ({spread}); {per_image}"),
        ("images/s", f"{record['images_per_second']:.1f}"),
        ("memory a device", f"{planned} planned by XLA; peak of the process so far {peak}"),
        (f"FLOPs a {unit}", f"{readable(counts['ideal'])} ideal"),
        ("  padded", times("padded", "ideal")),
        ("  traced", times("traced", "padded")),
        ("  XLA, compiled", f"{times('compiled', 'padded')}; may count a loop's body once"),
        ("useful FLOP/s", readable(record["useful_flops_per_second"])),
        ("useful MFU", f"{mfu:.1%} of the bfloat16 peak" if mfu is not None else "peak not known"),
    ]


def readable(value: float) -> str:
    """Four digits and a decimal prefix."""
    scales = ((1e12, "T"), (1e9, "G"))
    scale, prefix = next(((s, p) for s, p in scales if value >= s), (1e6, "M"))
    return f"{value / scale:.4g} {prefix}"
