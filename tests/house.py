"""Print the figures of the house: how many entries, how long, how wide, how many tests.

    python tests/house.py [--time]

Lines are those of `wc -l`, everything counted; the science is `core/`. How far the configuration
reaches: of the modules of ours that `training/loop.py` imports (itself included, directly or
through others, also inside functions), those with a function that takes a parameter named `config`
(the raw ConfigDict) or `experiment` (the frozen one). --time runs the tests as launch/test.sh does.
"""

import argparse
import ast
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "djepa_jax"
LONG_FUNCTION, LONG_FILE, WIDE = 60, 350, 100  # lines, lines, columns
PYTEST = [sys.executable, "-m", "pytest", "-m", "not slow"]


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.rglob("*.py"))


def count_lines(*paths: pathlib.Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in paths)


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.Module) -> set[str]:
    """What the imports of a module name; parts of modules, too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def reached(start: str, trees: dict[str, ast.Module]) -> set[str]:
    """All modules of ours that are imported for the sake of one, and itself."""
    found, waiting = set(), {start}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= (imported(trees[name]) & trees.keys()) - found
    return found


def takes(tree: ast.Module, parameter: str) -> bool:
    """Whether a function of the module has a parameter of that name."""
    arguments = [function.args for function in functions(tree)]
    return any(parameter == arg.arg for a in arguments for arg in (*a.args, *a.kwonlyargs))


def print_longest(title: str, lengths: dict[str, int], limit: int) -> None:
    """Print the ten longest, and all that are over the limit."""
    over = sum(length > limit for length in lengths.values())
    print(f"longest {title} ({over} over {limit}):")
    for name in sorted(lengths, key=lengths.get, reverse=True)[: max(10, over)]:
        print(f"{lengths[name]:8,} {'!' if lengths[name] > limit else ' '} {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", action="store_true", help="run the tests and say how long")
    timed = parser.parse_args().time
    trees = {module_name(path): ast.parse(path.read_bytes()) for path in files(PACKAGE)}

    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    named = sum(not name.startswith("__") for name in entries)
    print(f"entries of djepa_jax/: {named} ({len(entries)} with dunder files)")

    folders = sorted(path for path in PACKAGE.iterdir() if files(path))
    total = count_lines(*files(PACKAGE))
    for folder in (*folders, PACKAGE, ROOT / "configs", ROOT / "tests"):
        print(f"{count_lines(*files(folder)):8,} lines of {folder.relative_to(ROOT)}/")
    print(f"share of science: {count_lines(*files(PACKAGE / 'core')) / total:.1%}")

    lengths = {
        f"{name}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for name, tree in trees.items()
        for node in functions(tree)
    }
    print_longest("functions", lengths, LONG_FUNCTION)
    lengths = {str(path.relative_to(ROOT)): count_lines(path) for path in files(PACKAGE)}
    print_longest("files", lengths, LONG_FILE)

    everything = [path for name in ("djepa_jax", "configs", "tests") for path in files(ROOT / name)]
    lines = [line for path in everything for line in path.read_text("utf-8").splitlines()]
    print(f"lines wider than {WIDE}: {sum(len(line) > WIDE for line in lines)}")

    modules = reached("djepa_jax.training.loop", trees)
    for parameter in ("config", "experiment"):
        count = sum(takes(trees[name], parameter) for name in modules)
        print(f"modules that take `{parameter}`: {count} of the {len(modules)} below the loop")

    collect = [*PYTEST, "--collect-only", "-q", "-o", "addopts="]
    listed = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        said = (listed.stdout + listed.stderr).splitlines()[-1]
        sys.exit(f"tests: not counted, {said}; launch/test.sh makes .venv with what they need")
    print(f"tests: {listed.stdout.splitlines()[-1]}")
    if timed:
        start = time.monotonic()
        run = [*PYTEST, "-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]
        status = subprocess.run(run, cwd=ROOT).returncode
        print(f"minutes of the tests: {(time.monotonic() - start) / 60:.1f} (status {status})")


if __name__ == "__main__":
    main()
