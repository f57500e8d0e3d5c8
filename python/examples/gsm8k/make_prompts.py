"""Prompts for the experiment: the first 25 questions of GSM8K's test split, or 25 problems of our own.

    python make_prompts.py [--out prompts.json] [--number 25] [--bundled]

GSM8K (Cobbe et al. 2021, arXiv 2110.14168; MIT licence) comes through the package `datasets`. Without that package or
a network the problems in `problems.json` are taken, which were written for this example. The file says which ones it
has.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DATASET, CONFIGURATION, SPLIT = "openai/gsm8k", "main", "test"
BUNDLED = Path(__file__).with_name("problems.json")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the prompts of the GSM8K experiment.")
    parser.add_argument("--out", type=Path, default=Path("prompts.json"), help="the file (%(default)s)")
    parser.add_argument("--number", type=int, default=25, help="how many, from the first on (%(default)s)")
    parser.add_argument("--bundled", action="store_true", help="take the problems of our own in any case")
    options = parser.parse_args()
    prompts = make(options.number, bundled=options.bundled)
    options.out.write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{options.out}: {len(prompts['problems'])} problems, {prompts['source']}")
    return 0


def make(number: int = 25, *, bundled: bool = False) -> dict[str, Any]:
    """`source` says where the `problems` are from; each has a `question` and an `answer`, which is GSM8K's worked
    solution or the number."""
    if not bundled:
        try:
            return {"source": f"{DATASET} {SPLIT}", "problems": from_gsm8k(number)}
        except Exception as error:  # whatever a library that downloads raises
            print(f"GSM8K could not be had ({first_line(error)}): taking the bundled problems", file=sys.stderr)
    problems = json.loads(BUNDLED.read_text(encoding="utf-8"))
    return {
        "source": "bundled",
        "problems": [{key: p[key] for key in ("question", "answer")} for p in problems[:number]],
    }


def from_gsm8k(number: int) -> list[dict[str, str]]:
    from datasets import load_dataset

    rows = load_dataset(DATASET, CONFIGURATION, split=f"{SPLIT}[:{number}]")
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


if __name__ == "__main__":
    sys.exit(main())
