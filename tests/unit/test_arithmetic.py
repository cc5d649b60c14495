"""Sums are read by a parser of our own, and no text takes long or names anything but numbers."""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmft.errors import DataError
from mmft_plugins import _equations
from mmft_plugins._arithmetic import MAX_LENGTH, Parser, calculated, evaluated
from mmft_plugins._equations import solution, solved

settings.register_profile("sums", max_examples=150, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("-2^2", "-4"),
        ("2 ** 3 ^ 2", "512"),
        ("2^-1", "0.5"),
        ("10 // 3; -7 % 3", "3; 2"),
        ("8 - 3 - 2", "3"),
        ("2(3 + 4)", "14"),
        ("2pi", "6.28318530717959"),
        ("3!!", "720"),
        ("sqrt(16) + sqrt(2)", "5.41421356237309"),
        ("log(8, 2) + ln(e) + log10(1000) + log2(4) + exp(0)", "10"),
        ("sin(0) + cos(0) + tan(0)", "1"),
        ("max(1, 2, 3) - min(4, 5)", "-1"),
        ("round(2.567, 2) + abs(-1) + floor(2.7) + ceil(2.1)", "8.57"),
        ("7 × 6 ÷ 2 − 1", "20"),
        ("（1＋2）×2²".replace("＋", "+"), "12"),
        ("0.1 + 0.2", "0.3"),
        ("1.5e3 + .5 + 2.", "1502.5"),
        ("10^400 / 10^399", "10"),
        ("123456789 * 987654321", "121932631112635269"),
        ("12345678901.23 + 0.01", "12345678901.24"),
        ("9876543210987654/2", "4938271605493827"),
        ("12345678901234567890/10", "1234567890123456789"),
        ("0.1^30 - 2^-3", "-0.124999999999999999999999999999"),
        ("(1/3)*3; 1.5*2; -7.5//2; 7.5%2", "1; 3; -4; 1.5"),
        ("1/3; 200/3; 1e400/3", "0.33333333333333333; 66.666666666666667; 3.3333333333333333e+399"),
        ("sqrt(0.25); sqrt(2)^2; 4^0.5; round(2.675, 2)", "0.5; 2; 2; 2.68"),
        ("1.0001^100000", "22015.4560485522"),
        ("1e-300 * 1e-300; 1^999999", "1e-600; 1"),
    ],
)
def test_sums_have_their_values(text: str, value: str) -> None:
    assert calculated(text) == value


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("9**9**9", "the result of ^ is too large"),
        ("9^9^9^9^9^9^9", "the result of ^ is too large"),
        ("99999999^99999999", "the result of ^ is too large"),
        ("e^1000", "the result of ^ is too large"),
        ("1e999", "the number 1e999 is too large"),
        ("1e-999999999999", "the number 1e-999999999999 is too close to 0"),
        ("0.1^3000", "the result of ^ is too close to 0"),
        ("*".join(["1e-400"] * 20), "the result is too close to 0"),
        ("0^-" + "9" * 900, "division by zero"),
        ("100000!", "the result of factorial is too large"),
        ("1000!!", "the result of factorial is too large"),
        ("1.5!", "factorial has no value for 1.5"),
        ("1/0", "division by zero"),
        ("5 % 0", "division by zero"),
        ("0^-1", "division by zero"),
        ("(-8)^(1/3)", "^ has no value for -8"),
        ("sqrt(-1)", "sqrt has no value for -1"),
        ("(1 + 2", "a bracket is not closed after '2'"),
        ("1 +", "the text ends after '+'"),
        ("1 2", "'2' is not expected after '1'"),
        ("1,000", "',' is not expected after '1'"),
        ("x + 1", "'x' is no number; there are pi, e and sqrt"),
        ("sin 1", "sin needs its argument in brackets"),
        ("sqrt(1, 2)", "sqrt takes 1 numbers, found 2"),
        ("1 = 1", "an equation is not calculated but solved"),
        ("", "there is nothing to calculate"),
        ("__import__('os').system('ls')", '"\'" is no part of arithmetic'),
        ("().__class__", "'.' is no part of arithmetic"),
        ("()", "')' is not expected after '('"),
        ("open", "'open' is no number"),
        ("lambda: 1", "':' is no part"),
        ("(" * 400 + "1" + ")" * 400, "more than 50 brackets"),
        ("-" * 900 + "1", "more than 50 brackets"),
        ("1" * (MAX_LENGTH + 1), "1,001 characters; at most 1,000 are read"),
    ],
)
def test_what_has_no_value_is_one_line(text: str, error: str) -> None:
    with pytest.raises(DataError) as raised:
        calculated(text)
    assert error in str(raised.value) and "\n" not in str(raised.value)


def test_a_long_sum_needs_no_deep_stack() -> None:
    assert calculated("+".join("1" * 500)) == "500"


numbers = st.integers(0, 99).map(str) | st.sampled_from(("0.5", "1.25", "10"))
sums = st.recursive(
    numbers,
    lambda inner: (
        st.tuples(inner, st.sampled_from(("+", "-", "*", "/", "//", "%")), inner).map(" ".join)
        | inner.map("({})".format)
        | inner.map("-{}".format)
        | st.tuples(inner, st.sampled_from(("2", "3"))).map(lambda pair: f"({pair[0]}) ** {pair[1]}")
    ),
    max_leaves=8,
)
NODES: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip


def by_python(node: Any) -> Fraction:
    if isinstance(node, ast.BinOp):
        value = Fraction(NODES[type(node.op)](by_python(node.left), by_python(node.right)))
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > 3000:
            raise OverflowError
        return value
    return -by_python(node.operand) if isinstance(node, ast.UnaryOp) else Fraction(node.value)


@settings(settings.get_profile("sums"))
@given(text=sums)
def test_sums_are_what_pythons_own_grammar_makes_of_them(text: str) -> None:
    tree = ast.parse(text.lstrip(), mode="eval").body
    try:
        expected = by_python(tree)
    except (ZeroDivisionError, OverflowError):
        return
    assert evaluated(Parser(text).statements(";")[0][0]) == expected, text


@settings(settings.get_profile("sums"))
@given(text=st.text(alphabet="0123456789+-*/%^!().,;= ex\n²×πab_'\"[]{}\\", max_size=40) | st.text(max_size=20))
def test_no_text_is_anything_but_a_value_or_a_line(text: str) -> None:
    try:
        assert calculated(text)
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2x + 3 = 7", "x = 2"),
        ("x^2 - 5x + 6 = 0", "x = 2 or x = 3"),
        ("x^2 = 2", "x = -sqrt(2) ≈ -1.41421356237 or x = sqrt(2) ≈ 1.41421356237"),
        ("x + y = 3, x - y = 1", "x = 2, y = 1"),
        ("x + y = 3; x = y", "x = 3/2, y = 3/2"),
        ("x = x", "every value of x"),
        ("0.1x = 0.3", "x = 3"),
        ("log(x) = 2", "x = exp(2) ≈ 7.38905609893"),
        ("x = x + 1", "sympy finds no solution"),
    ],
)
def test_equations_have_their_solutions(text: str, found: str) -> None:
    assert solution(text, real=None) == found


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("1 + 1 = 2", "there is no unknown in it"),
        ("x = 9^9^9", "the result of ^ is too large"),
        ("x = 1/0", "division by zero"),
        ("x! = 24", "a factorial here is of a whole number"),
        ("x % 2 = 0", "% has no place in an equation"),
        ("a + b + c + d + f + g + h + k + m + n + o = 1", "11 unknowns; at most 10"),
        ("open('/etc/passwd')", "is no part of arithmetic"),
    ],
)
def test_what_cannot_be_solved_is_one_line(text: str, error: str) -> None:
    with pytest.raises(DataError, match=error.replace("^", r"\^")):
        solution(text, real=None)


def test_equations_are_solved_in_a_process_of_their_own() -> None:
    assert (
        solved("abs(x) = 3", seconds=60) == "x = -3 or x = 3"
    )  # in real numbers, where sympy has no method for complex ones
    with pytest.raises(DataError, match="division by zero"):
        solved("x = 1/0", seconds=60)


def test_an_equation_that_takes_too_long_is_given_up() -> None:
    with pytest.raises(DataError, match="not solved within 1 seconds and 2 GB"):
        solved("x^7 + sin(x)^9 * exp(x) + x^x^x = tan(x)", seconds=1)


def test_what_cannot_be_read_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_equations.sys, "executable", "/nowhere")
    with pytest.raises(DataError, match="the text ends after"):
        solved("x +")
