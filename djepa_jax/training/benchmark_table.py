"""What `benchmark.py` has measured, as a table for people."""

from collections.abc import Sequence

from djepa_jax.training.benchmark_compare import ENVIRONMENT, spread


def report(results: dict, parts: Sequence[str]) -> str:
    """The results of `parts` as a table for people."""
    config = results["config"]
    cuts = (f"{s['start']}-{s['stop']} ({s['visible']} + {s['new']})" for s in results["segments"])
    devices = f"{results['devices']} x {results['device']} ({results['platform']})"
    rows = [
        ("device", f"{devices}, mesh {_pairs(results['mesh'])}"),
        ("versions", _pairs(results["versions"])),
        *((name, results[name] or "none") for name in ENVIRONMENT),
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
    if "found" in record:
        return [(part, record["found"])]
    counts = record["flops"]

    def times(name: str, other: str) -> str:
        value = counts[name]
        known = value is not None
        return f"{readable(value)}, {value / counts[other]:.3f} x {other}" if known else "not known"

    rows = [(part, summary(record)), *kernel_rows(record["kernels"])]
    if "ideal" not in counts:
        return rows
    return rows + [
        (f"FLOPs a {record['unit']}", f"{readable(counts['ideal'])} ideal"),
        ("  padded", times("padded", "ideal")),
        ("  traced", times("traced", "padded")),
        ("  XLA, compiled", f"{times('compiled', 'padded')}; may count a loop's body once"),
        ("useful FLOP/s", readable(record["useful_flops_per_second"])),
    ]


def summary(record: dict) -> str:
    """One timed part on a line."""
    used, mfu = record["memory_bytes"], record["useful_mfu"]
    planned, peak = (
        f"{used[key] / 2**20:,.0f} MiB" if used[key] else "not known"
        for key in ("xla_plan", "device_peak")
    )
    useful = f"useful MFU {mfu:.1%} of the bfloat16 peak" if mfu else "MFU: peak not known"
    return (
        f"batch {record['batch_size']}: {spread(record)} a {record['unit']}, "
        f"{record['milliseconds_per_image']:.4g} ms an image, {record['images_per_second']:.4g} "
        f"images/s; {useful}; memory: {planned} planned by XLA, peak so far {peak}; compiled in "
        f"{record['compile_seconds']:.1f} s after {record['lower_seconds']:.1f} s of tracing"
    )


def kernel_rows(kernels: dict | None) -> list[tuple[str, str]]:
    """Rows for the largest kernels of one call, if it was traced."""
    if kernels is None:
        return []
    rows = [("  kernels", f"{kernels['milliseconds']:.3f} ms in {kernels['calls']} calls")]
    return rows + [("", f"{ms:9.3f} ms {n:5} x {name:.60}") for name, ms, n in kernels["largest"]]


def readable(value: float) -> str:
    """Four digits and a decimal prefix."""
    scales = ((1e12, "T"), (1e9, "G"))
    scale, prefix = next(((s, p) for s, p in scales if value >= s), (1e6, "M"))
    return f"{value / scale:.4g} {prefix}"


def suite_report(results: dict) -> str:
    """What every case of a suite has found, or why it has found nothing."""
    rows = []
    for name, case in results["cases"].items():
        record = results.get(name, {"found": case["outcome"]})
        rows += [(name, record.get("found") or summary(record))]
        rows += kernel_rows(record.get("kernels"))
    return "\n".join(["", *(f"{name:<20}{text}" for name, text in rows)])
