"""Equations solved by sympy, in a process of their own that may take so much time and memory and no more.

The text is read by our own parser and built into sympy's objects, so sympy never reads a text (its `sympify` runs it).
Run as a module this is that process: JSON on stdin and stdout.
"""

import json
import operator
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

from mmft.errors import DataError
from mmft_plugins._arithmetic import MAX_BITS, MAX_FACTORIAL, Name, Number, Parser, folded

CPU_SECONDS, PATIENCE = 10, 120  # of solving; until an answer, on whatever machine
MEMORY = 2 * 1024**3
MAX_UNKNOWNS = 10
PLAIN: Mapping[str, Callable[..., Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "negative": operator.neg,
}  # fmt: skip


def missing() -> str | None:
    """Why nothing can be solved here."""
    return None if find_spec("sympy") else "sympy is not installed; run: pip install sympy"


def solved(text: str, seconds: int = CPU_SECONDS) -> str:
    """The solutions of equations between `,` or `;`. Raises `DataError` where they cannot be read or solved in time."""
    Parser(text).statements(",", ";")  # what cannot be read needs no process
    command = [sys.executable, "-P", "-m", __name__]
    request = json.dumps({"text": text, "seconds": seconds})
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(f"not solved in {PATIENCE} seconds") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise DataError(f"not solved within {seconds} seconds and {MEMORY // 1024**3} GB") from None
    if "error" in answer:
        raise DataError(answer["error"])
    return str(answer["solution"])


def main() -> None:
    """Solve what stdin asks for."""
    import sympy  # noqa: F401 - its import does not count

    request = json.loads(sys.stdin.read())
    _limit(request["seconds"])
    try:
        answer = {"solution": _in_some_numbers(request["text"])}
    except DataError as error:
        answer = {"error": str(error)}
    except (NotImplementedError, ValueError, TypeError, ZeroDivisionError, OverflowError, RecursionError) as error:
        answer = {"error": f"sympy cannot solve this: {' '.join(str(error).split()) or 'no method'}"}
    sys.stdout.write(json.dumps(answer))


def _limit(seconds: int) -> None:
    """The system ends this process after so much more work: a busy machine takes no time away from it."""
    try:
        import resource
    except ImportError:  # Windows: the parent's patience is the limit
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, spent + seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _in_some_numbers(text: str) -> str:
    """The solutions in complex numbers, or where sympy has no method for those, in real ones."""
    try:
        return solution(text, real=None)
    except NotImplementedError:
        return solution(text, real=True)


def solution(text: str, *, real: bool | None) -> str:
    """What sympy finds, each solution as `x = 1, y = 2`, ` or ` between them. Raises `DataError` for a text without."""
    import sympy

    leaf, apply = partial(_leaf, sympy, real), partial(_applied, sympy)
    equations, unknowns = [], set[Any]()
    for sides in Parser(text).statements(",", ";"):
        built = [folded(side, leaf, apply) for side in sides]
        differences = [left - right for left, right in pairwise(built)] or built
        unknowns |= {symbol for one in built for symbol in one.free_symbols}
        equations += differences
    if not unknowns:
        raise DataError("there is no unknown in it")
    if len(unknowns) > MAX_UNKNOWNS:
        raise DataError(f"{len(unknowns)} unknowns; at most {MAX_UNKNOWNS} are solved for")
    symbols = sorted(unknowns, key=str)
    open_ones = [one for one in (sympy.simplify(one) for one in equations) if one != 0]
    if not open_ones:
        return f"every value of {', '.join(map(str, symbols))}"
    found = sympy.solve(open_ones[0] if len(open_ones) == 1 else open_ones, *symbols, dict=True)
    if not found:
        return "sympy finds no solution"
    return " or ".join(", ".join(_written(sympy, name, one[name]) for name in symbols if name in one) for one in found)


def _written(sympy: Any, name: Any, value: Any) -> str:
    """The exact value, and a decimal one beside a number that is no fraction."""
    close = f" ≈ {sympy.N(value, 12)}" if value.is_number and not value.is_Rational else ""
    return f"{name} = {value}{close}".replace("**", "^")


def _leaf(sympy: Any, real: bool | None, leaf: Number | Name) -> Any:
    if isinstance(leaf, Number):
        return sympy.Rational(leaf.text)
    return {"pi": sympy.pi, "e": sympy.E}.get(leaf.text) or sympy.Symbol(leaf.text, real=real)


def _applied(sympy: Any, name: str, values: list[Any]) -> Any:
    """An operation on sympy's objects; a power or factorial that would fill the memory is refused."""
    if name == "/" and values[1] == 0:
        raise DataError("division by zero")
    if name in PLAIN:
        return PLAIN[name](*values)
    if name == "^":
        base, exponent = values
        if base.is_Rational and exponent.is_Rational and abs(base) not in (0, 1):
            bits = max(int(base.p).bit_length(), int(base.q).bit_length())
            if bits * abs(exponent) > MAX_BITS:
                raise DataError("the result of ^ is too large")
        return base**exponent
    if name == "factorial" and not (values[0].is_Integer and 0 <= values[0] <= MAX_FACTORIAL):
        raise DataError(f"a factorial here is of a whole number up to {MAX_FACTORIAL}")
    if name in ("log2", "log10"):
        return sympy.log(values[0], int(name[3:]))
    functions = {"abs": "Abs", "ceil": "ceiling", "ln": "log", "min": "Min", "max": "Max"}
    if name in ("round", "%", "//"):
        raise DataError(f"{name} has no place in an equation")
    return getattr(sympy, functions.get(name, name))(*values)


if __name__ == "__main__":
    main()
