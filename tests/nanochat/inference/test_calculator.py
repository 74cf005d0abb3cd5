import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.inference.calculator import MAX_LENGTH, calculate


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("-7 + 2", "-5"),
        ("84/4", "21"),
        ("7/2", "3.5"),
        ("1/3", "0.3333333333"),
        ("1,250*2", "2500"),
        ("0.1+0.2", "0.3"),
        ("'banana'.count('a')", "3"),
        ('"banana".count("an")', "2"),
        ("'a,b,c'.count(',')", "2"),
        ("'1,000'.count(',')", "1"),
        ("  3 *3 ", "9"),
        ("7//2", "3"),
        ("7.5//2", "3"),
        ("1,234,567*2", "2469134"),
        ("100000000.0*100000000.0", "10000000000000000"),
        ("1/3000000", "0.0000003333333333"),
        ("2.5*-2", "-5"),
        (".5+.25", "0.75"),
    ],
)
def test_sums_and_counting(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "2**8", "1/0", "", "2+", "__import__('os')", "open('x')", "'a'.upper()", "'a'*9", "x", "True+1", "[1]", "1<2",
        "'a'.count('a', 0)", "'a'.count(sub='a')", "().__class__", "9//0", "7%3", "1e5", "0x10", "0b11",
        "1_000", "(1,2)", "1,2", "12,34", "1e999", "1e999-1e999",
        "b'a'.count(b'a')", "'a'.count('a')+1", "٣+١", "1j", "lambda: 1", "(1, 2)", "'%s'%1",
    ],
)  # fmt: skip
def test_other_expressions_are_rejected(expression):
    assert calculate(expression) is None


@pytest.mark.parametrize(
    "expression", ["9" * 100 + "*" + "9" * 100, "(" * 120 + "1" + ")" * 120, "-" * 250 + "1", "9" * 400]
)
def test_the_worst_is_quick(expression):
    started = time.perf_counter()
    calculate(expression)
    assert time.perf_counter() - started < 0.5
    assert len(expression) <= MAX_LENGTH or calculate(expression) is None


@given(a=st.integers(-999, 999), b=st.integers(-999, 999), c=st.integers(1, 99))
def test_agrees_with_python(a, b, c):
    assert calculate(f"{a} + {b}*{c}") == str(a + b * c)
    assert float(calculate(f"({a}-{b})/{c}")) == pytest.approx((a - b) / c, rel=1e-9, abs=1e-12)


@given(text=st.text("ab", max_size=30), part=st.text("ab", min_size=1, max_size=2))
def test_counting_agrees_with_python(text, part):
    assert calculate(f"'{text}'.count('{part}')") == str(text.count(part))
