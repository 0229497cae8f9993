#!/usr/bin/env python3
"""Prints how dense a Python file is, and fails where it is beyond the limits of train_gpt.py.

    python .ci/density.py [FILE ...]

Code lines are those that are neither blank nor a comment alone, docstrings included.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

LIMITS = {"lines": 1000, "longest line": 100, "mean length of a code line": 54.0, "lines over 90, %": 4.0,
          "longest function": 60, "ternaries per 100": 2.5, "nested comprehensions": 0, "walruses": 0}
LEAST = {"comment lines, %": 8.0, "blank lines, %": 8.0}
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def figures(text: str) -> dict[str, float]:
    lines, nodes = text.splitlines(), list(ast.walk(ast.parse(text)))
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    alone = sum(t.type == tokenize.COMMENT and t.line.strip().startswith("#") for t in tokens)
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = [m for n in nodes if isinstance(n, COMPREHENSIONS) for m in ast.walk(n)]
    return {
        "lines": len(lines),
        "longest line": max(map(len, lines)),
        "mean length of a code line": sum(map(len, code)) / len(code),
        "lines over 90, %": 100 * sum(len(line) > 90 for line in lines) / len(lines),
        "longest function": max(n.end_lineno - n.lineno + 1 for n in functions),
        "ternaries per 100": 100 * sum(isinstance(n, ast.IfExp) for n in nodes) / len(code),
        "nested comprehensions": sum(isinstance(m, COMPREHENSIONS) for m in inside)
        - sum(isinstance(n, COMPREHENSIONS) for n in nodes),
        "walruses": sum(isinstance(n, ast.NamedExpr) for n in nodes),
        "comment lines, %": 100 * alone / len(lines),
        "blank lines, %": 100 * sum(not line.strip() for line in lines) / len(lines)}


def main() -> None:
    root, bad = Path(__file__).resolve().parent.parent, []
    for path in sys.argv[1:] or [root / "train_gpt.py"]:
        for name, value in figures(Path(path).read_text(encoding="utf-8")).items():
            limit = f"at most {LIMITS[name]:g}" if name in LIMITS else f"at least {LEAST[name]:g}"
            wrong = value > LIMITS[name] if name in LIMITS else value < LEAST[name]
            bad += [name] * wrong
            print(f"{Path(path).name}: {name}: {value:.4g} ({limit}){' <- beyond' if wrong else ''}")
    sys.exit(f"density.py: beyond the limits: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
