"""What `benchmark.py` has measured, as a table for people."""

from collections.abc import Sequence

MAX_UNROLLED_DEPTH = (
    12  # up to which a training step is lowered layer by layer, which takes seconds
)


def report(results: dict, parts: Sequence[str]) -> str:
    """The results of `parts` as a table for people."""
    config = results["config"]

    def pairs(values: dict) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items())

    cuts = (f"{s['start']}-{s['stop']} ({s['visible']} + {s['new']})" for s in results["segments"])
    rows = [
        (
            "device",
            f"{results['devices']} x {results['device']} ({results['platform']}), mesh "
            f"{pairs(results['mesh'])}",
        ),
        ("versions", pairs(results["versions"])),
        ("XLA_FLAGS", results["XLA_FLAGS"] or "none"),
        ("compilation cache", results["compilation_cache"]),
        ("precision", f"{config['compute_dtype']}, matrix products {results['matmul_precision']}"),
        ("model", pairs(config["model"])),
        ("loss", pairs(config["loss"])),
        ("sample", pairs(config["sample"])),
        ("segments", f"{', '.join(cuts)}: steps (visible + new tokens)"),
    ]
    for part in parts:
        rows += [("", ""), *part_rows(part, results[part])]
    return "\n".join(f"{name:<20}{text}".rstrip() for name, text in rows)


def part_rows(part: str, record: dict) -> list[tuple[str, str]]:
    """Rows of the table for one part."""
    ms, used, unit, mfu = (
        record["milliseconds"],
        record["memory_bytes"],
        record["unit"],
        record["useful_mfu"],
    )
    runs = f"{len(record['seconds'])} repeats of {record['calls_per_repeat']}"
    spread = f"10 % {ms['p10']:.1f}, 90 % {ms['p90']:.1f}, least {ms['min']:.1f}; {runs}"
    planned, peak = (
        f"{used[key] / 2**20:,.0f} MiB" if used[key] else "not known"
        for key in ("xla_plan", "device_peak")
    )
    pieces = f" in {record['microbatches']} parts" if record["microbatches"] > 1 else ""
    return [
        (part, f"batch {record['batch_size']}{pieces}"),
        (
            "compile",
            f"{record['compile_seconds']:.1f} s, after {record['lower_seconds']:.1f} s of tracing "
            "and lowering",
        ),
        ("programs compiled", str(record["programs_compiled"])),
        (
            "time",
            f"{ms['median']:.1f} ms a {unit} ({spread}); {record['milliseconds_per_image']:.2f} "
            "ms an image",
        ),
        ("images/s", f"{record['images_per_second']:.1f}"),
        ("memory a device", f"{planned} planned by XLA; peak of the process so far {peak}"),
        *flop_rows(record["flops"], unit),
        ("useful FLOP/s", readable(record["useful_flops_per_second"])),
        (
            "useful MFU",
            f"{mfu:.1%} of the bfloat16 peak"
            if mfu is not None
            else "peak not known for this device",
        ),
    ]


def readable(value: float) -> str:
    """Four digits and a decimal prefix."""
    scale, prefix = next(((s, p) for s, p in ((1e12, "T"), (1e9, "G")) if value >= s), (1e6, "M"))
    return f"{value / scale:.4g} {prefix}"


def flop_rows(counts: dict, unit: str) -> list[tuple[str, str]]:
    """The five counts, each beside the one that it ought to be near."""

    def row(name: str, other: str, missing: str = "not known", remark: str = "") -> str:
        value = counts[name]
        return (
            missing
            if value is None
            else f"{readable(value)}, {value / counts[other]:.3f} x {other}{remark}"
        )

    return [
        (f"FLOPs a {unit}", f"{readable(counts['ideal'])} ideal"),
        ("  padded", row("padded", "ideal")),
        ("  traced", row("traced", "padded")),
        (
            "  XLA, unrolled",
            row("unrolled", "padded", f"not made (for training up to depth {MAX_UNROLLED_DEPTH})"),
        ),
        ("  XLA, compiled", row("compiled", "padded", remark="; may count a loop's body once")),
    ]
