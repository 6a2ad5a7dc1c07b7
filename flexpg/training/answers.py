r"""Reading of answers: the number that a text claims, exactly, and the expression in a box, with math-verify.

A text claims a number if it has exactly one, however it is written: `1,234.50`, `12 000`, `- 5`, `2½`, `3 1/2`,
`\frac12`, `3 \times 10^5`. Words, units, currencies, percent signs and markup around it are ignored. Several numbers,
an expression that is not evaluated, an inequality, "5 or more" or "not 5" claim nothing: rewarding a wrong answer is
worse than missing a right one.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import Any

_MAX_DIGITS = 100  # longer ones are not answers, and exact arithmetic with them is slow
_DECIMAL = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+"
_CURRENCY = "(?:[$€£¥₹] ?)?"
_NUMBER = re.compile(
    rf"{_CURRENCY}(?P<sign>[-+] ?)?{_CURRENCY}"
    rf"(?:(?P<whole>\d+) (?=\d+/\d))?(?P<number>{_DECIMAL})(?:E(?P<exponent>[-+]?\d+)| ?/ ?(?P<below>{_DECIMAL}))?"
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES |= {"lakh": 10**5, "crore": 10**7}
_SCALE = re.compile(rf"\b(?:{'|'.join(_SCALES)})\b", re.IGNORECASE)

# Normalisation, for both readings: the text stays LaTeX.
_SPELLINGS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"(?<=\d)(?:\{,\}(?:\\!)?|,\\!)(?=\d{3})"), ""),
    (re.compile(r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3})"), " "),
    (re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?!\d)"), lambda found: found[0].replace(" ", "")),
    (re.compile(r"(?<!\w)(?<!\d )[\u2010-\u2015](?= ?[\d.$\\])"), "-"),  # not in a range or between words
]
# Plain text from LaTeX and Markdown, for numbers only.
_FRACTION = r"\\[cdt]?frac *(?:\{{ *{0} *\}}|(\d)) *(?:\{{ *(\d[\d,]*) *\}}|(\d))"
_PLAIN = [
    (re.compile(r"<<[^<>\n]*>>"), ""),  # GSM8K's calculator annotations
    (re.compile(r"(\d) *" + _FRACTION.format(r"(\d[\d,]*)")), r"\1 \2\3/\4\5"),
    (re.compile(_FRACTION.format(r"(-? ?\d[\d,]*)")), r"\1\2/\3\4"),
    (re.compile(r"(?<!\d)(\d+) *\\over *(\d+)"), r"\1/\2"),
    (re.compile(r"(?<=\d) *(?:[*\u00d7·x]|\\times|\\cdot) *10 *\^ *\{? *([-+]?\d+) *\}?"), r"E\1"),
    (re.compile(r"(?<=\d)[eE]([-+]?\d+)(?!\w)"), r"E\1"),
    (re.compile(r"\^ *\{? *\\circ *\}?|°"), " "),
    (re.compile(r"\\(?:text|math)[a-z]*|\\[mf]?box(?:ed)?|\\(?:left|right|quad|displaystyle)(?![a-z])"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[()\[\],;: ]|~|\*\*|__|`|\}\{"), " "),
    (re.compile(r"[{}]"), ""),
    (re.compile(r"(?:(?<!\d)_?|(?<=\d)(?![EXex]))[^\W\d_](?:\^|_)?\d+"), "#"),  # m2, m^2, x_1
    (re.compile(r" +"), " "),
]
_LABEL = re.compile(r"\b(?:step|part|question|problem|case|option) *#?\d+\b[.:)]?", re.IGNORECASE)
_NOT_AN_EQUATION = re.compile(r"[<>!]$|\bor\b|=.*(?:,(?!\d)|;|\band\b)")  # left of "=": of >=, or of several
_NOT_CLAIMED_BEFORE = re.compile(
    r"\b(?:not|least|most|than|between|half|twice)\b|n't\b|[<>≤≥≠≈|]|[-+*/^\u00d7÷·!] *[([]*$"
)
_NOT_CLAIMED_AFTER = re.compile(
    r" ?[*^+\u00d7÷·±√π!<>≤≥百千万億亿]|(?:k|K|M|B|bn|mn|[nxyz])\b|\.\.|…|.*\b(?:or|and|half|squared)\b"
)
# What may be around the only number of a box; everything else is left to math-verify.
_UNIT = [
    (re.compile(r"(?:\\[,;: ]| |~)*\\(?:text|mathrm|mbox) *\{[^{}\d]*\}(?:\^\{?\d\}?)?[ .]*$"), ""),
    (re.compile(r"(?<=\d )(?:[ckm]?m|in|ft)\^?\{?[23]\}?(?!\w)"), ""),
]
_UNIT_AFTER = r"(?: [^\W\d_]{3,}(?:[ /][^\W\d_]+)*| ?/ ?[^\W\d_]{3,}| k?m/[hs]| ?%)? ?\.?"
_BOXED_NUMBER = re.compile(_NUMBER.pattern + _UNIT_AFTER)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MIXED = re.compile(
    r"(?<![\w.,/^}])(\d{1,6}) *(?:\\[dt]?frac\{(\d{1,6})\}\{(\d{1,6})\}|(?<= )(\d{1,6})/(\d{1,6})(?!\d))"
)


def marked_number(text: str) -> Fraction | None:
    r"""Return the number that is claimed after the last `####`, on the first line with a digit, after its last `=`.

    >>> marked_number("2 * 4 = 8\n#### $8.50 per day"), marked_number("#### 5 or 6")
    (Fraction(17, 2), None)
    """
    _, mark, marked = text.rpartition("####")
    for line in _normalized(marked).splitlines() if mark else ():
        line = _LABEL.sub(" ", _plain(line))
        if any(map(str.isdecimal, line)):
            left, _, right = line.rpartition("=")
            return None if _NOT_AN_EQUATION.search(left) else claimed_number(right)
    return None


def claimed_number(text: str) -> Fraction | None:
    r"""Return the number that a line of text claims, None if it does not claim exactly one.

    >>> claimed_number(r"3\frac{1}{2} cups"), claimed_number("12 000"), claimed_number("5 - 6")
    (Fraction(7, 2), Fraction(12000, 1), None)
    """
    text = _plain(_normalized(text)).strip(" *")
    found = _NUMBER.search(text)
    if found is None or "\\" in text:
        return None
    before, after = text[: found.start()], text[found.end() :]
    if any(map(str.isdecimal, before + after)) or _is_operator(found["sign"], before):
        return None
    if _NOT_CLAIMED_BEFORE.search(before) or _NOT_CLAIMED_AFTER.match(after):
        return None
    value, scales, scale = _value(found), _SCALE.findall(after), _SCALE.match(after.lstrip())
    if value is None or len(scales) > (scale is not None):  # a hundred thousand, per hundred
        return None
    return value * _SCALES[scale[0].lower()] if scale else value


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text, None if there is none.

    >>> last_number("3 + 4 = 7, so -7/2.")
    Fraction(-7, 2)
    """
    number, plain = None, _plain(_normalized(text))
    for found in _NUMBER.finditer(plain):
        value = _value(found)
        if value is not None:
            before = plain[max(0, found.start() - 2) : found.start()]
            number = abs(value) if _is_operator(found["sign"], before) else value
    return number


def equal_expressions(completion: str, answer: str) -> bool:
    """Return whether a completion's final expression equals the answer, by math-verify.

    math-verify finds the expression (a box first) and compares. A box with only a number and perhaps its unit is read
    here, because math-verify reads `12 000` as 0; Unicode and mixed numbers become LaTeX that it reads.

    Raises:
        ImportError: If math-verify is not installed.
        ValueError: If math-verify reads nothing in the answer.
    """
    try:
        from latex2sympy2_extended.math_normalization import extract_boxed_content
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("math_correct needs math-verify: pip install 'flexpg[recipes]'") from error
    seconds = 5 if threading.current_thread() is threading.main_thread() else None  # its timeouts are signals

    def read(text: str) -> list[Any]:
        text = _MIXED.sub(_improper, _normalized(text))
        is_single = len(_BOX.findall(text)) == 1
        text = _BOX.sub(r"\\boxed{" if is_single else r"\\boxed{\\,", text)  # math-verify joins 3 and 456 as 3,456
        box = extract_boxed_content(text, "last")
        if re.search(rf"\\boxed\{{\s*{re.escape(box)}\s*\}}", text) and (numbers := _boxed_numbers(box)):
            return numbers
        return parse(text, parsing_timeout=seconds)

    is_marked = "\\boxed" in answer or answer.count("$") > 1
    gold = read(answer if is_marked else f"\\boxed{{{answer}}}")
    if not gold:
        raise ValueError(f"the answer must be an expression that math-verify reads, got {answer!r}")
    return bool(verify(gold, read(completion), timeout_seconds=seconds))


def _boxed_numbers(box: str) -> list[Any]:
    """Return the number in a box, nothing if there is more than a number and its unit; 50% is 50 and 1/2."""
    from sympy import Rational

    text = box
    for pattern, replacement in _UNIT:
        text = pattern.sub(replacement, text)
    plain = _plain(text).strip(" *()")
    number = claimed_number(text)
    if number is None or not _BOXED_NUMBER.fullmatch(plain):
        return []
    value = Rational(number.numerator, number.denominator)
    value = value.evalf(30) if "." in plain else value  # math-verify compares decimals to six places
    return [value, value / 100] if "%" in plain else [value]


def _improper(found: re.Match[str]) -> str:
    """Return a mixed number as an improper fraction; math-verify reads them in LaTeX only."""
    whole, above, below = (int(part) for part in found.groups() if part)
    return rf"\frac{{{whole * below + above}}}{{{below}}}" if above < below else found[0]


def _is_operator(sign: str | None, before: str) -> bool:
    """Return whether a sign is an operator or a dash after the text before it: `x-5`, `7 -5`, `total - 5`."""
    if sign is None:
        return False
    last, last_word = before[-1:], before.rstrip()[-1:]
    return last.isalnum() or last_word.isdecimal() or last_word == ")" or (sign[1:] == " " and last_word.isalnum())


def _value(found: re.Match[str]) -> Fraction | None:
    """Return the exact value of a match of _NUMBER, None if it divides by 0 or is too long."""
    parts = [found[name] or "" for name in ("whole", "number", "below")]
    if len("".join(parts)) > _MAX_DIGITS or len(found["exponent"] or "") > 3:
        return None
    whole, number, below = (Fraction(part.replace(",", "") or 0) for part in parts)
    if found["below"]:
        if not below:
            return None
        number /= below
    value = (whole + number) * Fraction(10) ** int(found["exponent"] or 0)
    return -value if (found["sign"] or "").startswith("-") else value


def _normalized(text: str) -> str:
    """Return a text with ASCII digits, signs and spaces, LaTeX for Unicode fractions and powers, and joined digits."""
    if not text.isascii():
        text = re.sub(r"\}\^\{", "", "".join(map(_ascii, text)))
    for spelling, replacement in _SPELLINGS:
        text = spelling.sub(replacement, text)
    return text


def _ascii(char: str) -> str:
    if char.isascii():
        return char
    kind, compatible = unicodedata.decomposition(char), unicodedata.normalize("NFKC", char)
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    if kind.startswith("<fraction>") and compatible[-1:].isdecimal():
        return r"\frac{{{}}}{{{}}}".format(*compatible.split("\u2044"))
    if kind.startswith("<super>") and not compatible.isalpha():
        return f"^{{{compatible.replace(chr(0x2212), '-')}}}"
    if unicodedata.category(char) == "Zs":
        return " "
    if kind.startswith("<wide>"):
        return compatible
    return {"\u2212": "-", "\u2044": "/"}.get(char, char)


def _plain(text: str) -> str:
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    return text
