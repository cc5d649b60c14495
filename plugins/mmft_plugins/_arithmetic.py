"""Arithmetic as people and models write it: a tokenizer, a parser by precedence climbing, and a bounded evaluation.

Python's own parser and `eval` are not used, so a text can name nothing but what stands in the tables here. Every bound
(length, nesting, size of a number) is checked before the work is done, so no text takes long. What + - * / make of
decimal numbers is exact; only functions, pi, e and roots calculate with floating point.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from typing import TypeAlias, TypeVar

from mmft.errors import DataError

MAX_LENGTH, MAX_DEPTH = 1000, 50  # characters of a text, brackets and signs inside one another
MAX_BITS = 10_000  # of a whole number: about 3,000 digits; of both halves of a fraction
MAX_EXPONENT = 400  # of a literal: 1e400
MAX_PLACES = 100  # behind the point, of a decimal that is written in full
MAX_FACTORIAL = 1000
TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([^\W\d]\w*)|(\*\*|//|[-+*/%^!()=,;]))")
SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "²": "^2", "³": "^3", "（": "(", "）": ")",
                           "，": ",", "；": ";", "＝": "=", "π": " pi ", "\n": ";"})  # fmt: skip
# Operator: how tightly it binds, and whether to the right.
BINARY = {
    "+": (1, False), "-": (1, False), "*": (2, False), "/": (2, False), "//": (2, False), "%": (2, False),
    "^": (4, True),
}  # fmt: skip
SIGN = 3  # a sign binds tighter than a product and less than a power: -2^2 is -4


@dataclass(frozen=True, slots=True)
class Number:
    """A literal, as it is written."""

    text: str


@dataclass(frozen=True, slots=True)
class Name:
    """A constant or an unknown."""

    text: str


@dataclass(frozen=True, slots=True)
class Operation:
    """An operator or a function with what it is applied to."""

    name: str
    operands: "tuple[Tree, ...]"


Tree: TypeAlias = Number | Name | Operation
Value: TypeAlias = int | Fraction | float  # a fraction is never whole
T = TypeVar("T")


class Parser:
    """One text. `2 x` and `2 (3 + 4)` are products, `!` is the factorial, `^` and `**` are the same."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise DataError(f"{len(text):,} characters; at most {MAX_LENGTH:,} are read")
        self._tokens = list(_tokens(text.translate(SPELLINGS)))
        self._at = self._depth = 0

    def statements(self, *separators: str) -> list[list[Tree]]:
        """What stands between separators: the sides of an equation, or one expression. Raises `DataError`."""
        found: list[list[Tree]] = []
        while self._next():
            if self._take(*separators):
                continue
            sides = [self._expression(0)]
            while self._take("="):
                sides.append(self._expression(0))
            found.append(sides)
            if self._next() and not self._take(*separators):
                raise DataError(f"{self._next()!r} is not expected after {self._before()}")
        if not found:
            raise DataError("there is nothing to calculate")
        return found

    def _expression(self, tightness: int) -> Tree:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise DataError(f"more than {MAX_DEPTH} brackets, signs or powers inside one another")
        tree = self._operand()
        while True:
            token = self._next()
            if token == "!":
                self._at += 1
                tree = Operation("factorial", (tree,))
                continue
            implicit = token == "(" or token[:1].isalpha() or token[:1] == "_"
            operator = "*" if implicit else token
            binds, to_the_right = BINARY.get(operator, (-1, False))
            if binds < tightness or binds < 0:
                self._depth -= 1
                return tree
            self._at += 0 if implicit else 1
            tree = Operation(operator, (tree, self._expression(binds if to_the_right else binds + 1)))

    def _operand(self) -> Tree:
        token = self._next()
        if not token:
            raise DataError(f"the text ends after {self._before()}")
        self._at += 1
        if token in ("-", "+"):
            operand = self._expression(SIGN)
            return Operation("negative", (operand,)) if token == "-" else operand
        if token == "(":
            tree = self._expression(0)
            self._close()
            return tree
        if token[0].isdigit() or token[0] == ".":
            return Number(token)
        if token[0].isalpha() or token[0] == "_":
            return self._call(token) if token in FUNCTIONS else Name(token)
        raise DataError(f"{token!r} is not expected after {self._before(2)}")

    def _call(self, name: str) -> Tree:
        if not self._take("("):
            raise DataError(f"{name} needs its argument in brackets: {name}(...)")
        operands = [self._expression(0)]
        while self._take(","):
            operands.append(self._expression(0))
        self._close()
        least, most = FUNCTIONS[name]
        if not least <= len(operands) <= most:
            takes = str(least) if least == most else f"{least} to {most}"
            raise DataError(f"{name} takes {takes} numbers, found {len(operands)}")
        return Operation(name, tuple(operands))

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *tokens: str) -> bool:
        taken = self._next() in tokens
        self._at += taken
        return taken

    def _close(self) -> None:
        if not self._take(")"):
            raise DataError(f"a bracket is not closed after {self._before()}")

    def _before(self, back: int = 1) -> str:
        last = self._at - back
        return repr(self._tokens[last]) if 0 <= last < len(self._tokens) else "the beginning"


def _tokens(text: str) -> Iterator[str]:
    at = 0
    while at < len(text.rstrip()):
        found = TOKEN.match(text, at)
        if not found:
            raise DataError(f"{text[at:].lstrip()[:1]!r} is no part of arithmetic")
        yield "^" if found[3] == "**" else found[found.lastindex or 0]
        at = found.end()


def calculated(text: str) -> str:
    """The value of each expression in a text, as text, `; ` between them. Raises `DataError` for what has none."""
    values = []
    for sides in Parser(text).statements(";"):
        if len(sides) > 1:
            raise DataError("an equation is not calculated but solved; give an expression without '='")
        values.append(written(evaluated(sides[0])))
    return "; ".join(values)


def evaluated(tree: Tree) -> Value:
    """The number a tree stands for. Raises `DataError` where there is none, or none of a size worth having."""
    return folded(tree, _leaf, _applied)


def folded(tree: Tree, leaf: Callable[[Number | Name], T], apply: Callable[[str, list[T]], T]) -> T:
    """The value of a tree from its leaves up, without recursion: a sum of 500 numbers is 500 deep."""
    order: list[Tree] = [tree]
    for node in order:
        order += node.operands if isinstance(node, Operation) else ()
    waiting: list[T] = []
    for node in reversed(order):
        if isinstance(node, Operation):
            values = [waiting.pop(0) for _ in node.operands]
            waiting.append(apply(node.name, values[::-1]))
        else:
            waiting.append(leaf(node))
    return waiting[0]


def _leaf(leaf: Number | Name) -> Value:
    if isinstance(leaf, Name):
        if leaf.text not in CONSTANTS:
            raise DataError(f"{leaf.text!r} is no number; there are {', '.join(CONSTANTS)} and {', '.join(FUNCTIONS)}")
        return CONSTANTS[leaf.text]
    _, _, exponent = leaf.text.lower().partition("e")
    if abs(int(exponent or 0)) > MAX_EXPONENT:
        raise DataError(f"the number {leaf.text} is too {'close to 0' if exponent[0] == '-' else 'large'}")
    return _plain(Fraction(leaf.text))


def _applied(name: str, values: list[Value]) -> Value:
    try:
        return _checked(OPERATIONS[name](*values))
    except ZeroDivisionError:
        raise DataError("division by zero") from None
    except (ValueError, TypeError):
        raise DataError(f"{name} has no value for {', '.join(map(written, values))}") from None
    except OverflowError:
        raise DataError(f"the result of {name} is too large") from None


def written(value: Value) -> str:
    """Whole and decimal numbers in full, other fractions to 17 digits, what is floating point to 15."""
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return format(value, ".15g")
    twos = (value.denominator & -value.denominator).bit_length() - 1
    rest, fives = value.denominator >> twos, 0
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if rest > 1 or places > MAX_PLACES:
        digits = Context(prec=17)
        return str(digits.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize(digits)).lower()
    whole = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    return f"{'-' if value < 0 else ''}{whole[:-places]}.{whole[-places:]}"


def _checked(value: Value) -> Value:
    """As it is kept: fractions that became too long are rounded. Raises `DataError` where nothing is left of one."""
    if isinstance(value, Fraction):
        value = _plain(value)
    if isinstance(value, Fraction) and _bits(value) > MAX_BITS:
        value = _rounded_off(value)
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise OverflowError
    if isinstance(value, float) and not math.isfinite(value):
        raise OverflowError
    return value


def _plain(value: Fraction) -> Value:
    return value.numerator if value.denominator == 1 else value


def _bits(value: int | Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _rounded_off(value: Fraction) -> float:
    if not (rounded := float(value)):
        raise DataError("the result is too close to 0")
    return rounded


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        if base.bit_length() * exponent > MAX_BITS + base.bit_length() and abs(base) > 1:
            raise OverflowError
        return int(base**exponent)
    result: float | complex
    if not isinstance(base, float) and isinstance(exponent, int):
        if base in (-1, 0, 1) or _bits(base) * abs(exponent) <= MAX_BITS:
            return Fraction(base) ** exponent
        digits = Context(prec=50, traps=[])
        result = float(digits.power(digits.divide(Decimal(base.numerator), Decimal(base.denominator)), exponent))
    else:
        result = float(base) ** float(exponent)
    if isinstance(result, complex):
        raise ValueError
    if base and not result:
        raise DataError("the result of ^ is too close to 0")
    return float(result)


def _factorial(number: Value) -> int:
    if number != int(number) or number < 0:
        raise ValueError
    if number > MAX_FACTORIAL:
        raise OverflowError
    return math.factorial(int(number))


def _rounded(value: Value, digits: Value = 0) -> Value:
    places = int(digits)
    if digits != places or abs(places) > 50:
        raise ValueError
    rounded: Value = round(float(value), places) if isinstance(value, float) else round(Fraction(value), places)
    return rounded if places else round(value)


def _root(value: Value) -> Value:
    """Exact where there is such a number: of 16, of 0.25."""
    if not isinstance(value, float) and value >= 0:
        root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
        if root**2 == value:
            return root
    return math.sqrt(value)


def _logarithm(value: Value, base: Value = math.e) -> float:
    if base == math.e:
        return math.log(value)
    return math.log2(value) if base == 2 else math.log10(value) if base == 10 else math.log(value, base)


MANY = 20
# Function: the least and the most numbers it takes.
FUNCTIONS = {
    "sqrt": (1, 1), "cbrt": (1, 1), "sin": (1, 1), "cos": (1, 1), "tan": (1, 1), "asin": (1, 1), "acos": (1, 1),
    "atan": (1, 1), "sinh": (1, 1), "cosh": (1, 1), "tanh": (1, 1), "log": (1, 2), "ln": (1, 1), "log2": (1, 1),
    "log10": (1, 1), "exp": (1, 1), "abs": (1, 1), "round": (1, 2), "floor": (1, 1), "ceil": (1, 1), "min": (2, MANY),
    "max": (2, MANY), "factorial": (1, 1),
}  # fmt: skip
CONSTANTS: Mapping[str, float] = {"pi": math.pi, "e": math.e}
OPERATIONS: Mapping[str, Callable[..., Value]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left / right if isinstance(left, float) else Fraction(left) / right,
    "//": lambda left, right: left // right,
    "%": lambda left, right: left % right,
    "^": _power,
    "negative": lambda value: -value,
    "sqrt": _root,
    "log": _logarithm,
    "ln": math.log,
    "abs": abs,
    "round": _rounded,
    "min": min,
    "max": max,
    "factorial": _factorial,
    **{
        name: getattr(math, name)
        for name in (
            "cbrt", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "log2", "log10", "exp",
            "floor", "ceil",
        )
    },
}  # fmt: skip
