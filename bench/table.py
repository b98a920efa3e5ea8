"""Writes a benchmark's figures into the README: ``python bench/table.py bench/results/epyc-avx512/results.json``.

Called by ``bench/run.py --table README.md``. In the page, one sentence replaces what stands between ``<!-- figure -->``
and ``<!-- /figure -->``; the machine and a row a case replace what stands between ``<!-- table -->`` and
``<!-- /table -->``.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from plot import DISTURBED

#: The case of the sentence.
LOSS, SHAPE = "dkd", "64 x 32000"
INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "128-bit vectors"}


def show(value: float | None) -> str:
    """Three digits; a hyphen where there is no figure, as where a contender's own error exceeds its tolerance."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def fused_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [row for row in results["results"] if row["phase"] == "forward+backward" and row["contender"] == "fused"]
    return [row for row in rows if row["status"] == "ok"]


def disturbed(results: dict[str, Any]) -> float:
    """The largest share of the CPUs that other processes used while one of the figures was taken."""
    return max(row["cpu_used_by_others"] or 0.0 for row in fused_rows(results))


def machine(results: dict[str, Any]) -> str:
    facts = results["machine"]
    kernels = INSTRUCTION_SETS.get(facts["instruction_set"], "no kernels")
    text = f"{facts['cpu']}, {kernels}, {facts['threads']} threads, torch {facts['torch']}, {facts['when'][:10]}."
    share = disturbed(results)
    if share > DISTURBED:
        text += f" **Trial run: other processes used up to {share:.0%} of the CPUs. Not figures to quote.**"
    return text


def sentence(results: dict[str, Any]) -> str:
    row = next(row for row in fused_rows(results) if (row["loss"], row["shape"]) == (LOSS, SHAPE))
    threads = results["machine"]["threads"]
    figure = (
        f"{show(row['milliseconds'])} ms, {row['times_faster_than_eager']:.0f} times as fast\nas the paper's formula"
    )
    text = f"DKD with its gradient at {SHAPE}, float32, on {threads} CPU threads: **{figure}** in PyTorch."
    return f"{text} (Trial run on a busy machine: not a figure to quote.)" if disturbed(results) > DISTURBED else text


def table(results: dict[str, Any]) -> str:
    lines = [
        machine(results),
        "",
        "| logits | loss | ms | x eager | x compile | time / floor |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = fused_rows(results)
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    for row in sorted(rows, key=lambda row: shapes.index(row["shape"])):
        names = ("milliseconds", "times_faster_than_eager", "times_faster_than_compile", "times_the_floor")
        cells = [
            row["shape"],
            row["loss"].upper().replace("_", "-"),
            *(show(row[n]) for n in names),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rewrite(path: Path, results: dict[str, Any]) -> None:
    """Replaces figure and table in the page.

    Raises:
        ValueError: the page lacks a pair of markers.
    """
    text = path.read_text()
    for name, new, gap in (("figure", sentence(results), "\n"), ("table", table(results), "\n\n")):
        pattern = re.compile(rf"(<!-- {name} -->).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{path} must have the markers <!-- {name} --> and <!-- /{name} -->")
        text = pattern.sub(lambda match, new=new, gap=gap: f"{match[1]}{gap}{new}{gap}{match[2]}", text)
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of bench/run.py")
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "README.md")
    options = parser.parse_args()
    rewrite(options.page, json.loads(options.results.read_text()))


if __name__ == "__main__":
    main()
