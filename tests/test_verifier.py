"""The verifier: what is right, what is wrong, and that no text stops a run."""

import os
import sys
import threading
import time

import pytest

from tasks import UserError, extract_answer, is_correct, symbolic
from tasks.verifier import gold_answer

RIGHT = {  # answer: completions
    "72": [
        r"\boxed{72}", r"first \boxed{5}, then \boxed{72}", r"\boxed{72} and 5 more",
        r"#### 5 but \boxed{72}", r"\boxed{72} #### 5", "#### 72", "#### 5\n#### 72", "####72",
        "####\n72", "5 + 67\n#### 72\nthat is all, 100%", "the answer is 72", "5 + 67 = 72",
        "5 + 67 = 72.", "it is 72, I think", r"an open \boxed{5 but #### 72",
        r"an open \boxed{5 but 72", "#### 72.0", "#### $72", r"#### \$72", "#### 72 dollars",
        "#### x = 72", "#### 72.", r"\boxed{ 72 }", "72", "#### 72km", r"\boxed {72}",
        r"\fbox{72}", r"\boxed{72 apples}", r"\boxed{72\text{ apples}}", r"\boxed{72\,\mathrm{m}}",
        r"\boxed{72\,\mathrm{km}/\mathrm{h}^2}", r"\boxed{72^\circ}", r"\boxed{72^{\circ}\text{C}}",
        r"\boxed{$72$}", r"\boxed{\(72\).}", r"\boxed{x = 72}", r"\boxed{f(x)=72}",
        r"\boxed{x_{1}=72}", r"\boxed{5 + 67 = 72}", "so $5 + 67 = 72$.", r"\boxed{\sqrt{5184}}",
        r"\boxed{72\%}", r"\boxed{(72)}", "$5 and $72", "= $5\n5 + 67 = 72$",
        r"\[ \boxed{72.} \]", r"it is \(72\).",
        r"\boxed{\frac{144}{2}}", r"\boxed{\text{72}}", r"\boxed{\boxed{72}}", r"\boxed{+72}",
    ],
    "72.00": ["#### 72"],
    "1000": ["#### 1,000", "#### 1e3", r"\boxed{1 000}", r"\boxed{1\,000}", r"\boxed{10^3}"],
    "1,000": ["#### 1000"],
    "2400": [r"\boxed{2{,}400}", r"\boxed{2,\!400}", r"\boxed{2.4 \times 10^{3}}", "2,400"],
    "1234567.5": ["#### 1,234,567.5"],
    "0.5": ["#### 1/2", "#### .5", r"\boxed{\frac{1}{2}}", r"\boxed{\frac 12}"],
    "1/2": ["#### 0.5", r"so it is $\frac{1}{2}$."],
    "0.75": [r"\boxed{\dfrac{3}{4}}"],
    "0.875": [r"\boxed{\frac78}", r"\boxed{\tfrac{7}8}"],
    "4.6": [r"\boxed{4\frac{3}{5}}", r"\boxed{4 \frac35}", r"\boxed{4 3/5}"],
    "-0.5": [r"\boxed{-\frac{1}{2}}"],
    "-4.5": [r"\boxed{-4\frac{1}{2}}"],
    "-3": ["#### -3", "#### \u22123", "so 5 - 8 = -3"],
    "3": ["#### +3"],
    "5": ["so 8-5"],
    "50": ["#### 50%", r"\boxed{50\%}"],
    "0.25": ["#### 2.5E-1"],
    "4.5e33": [r"\boxed{4.5 \times 10^{33}}", r"\boxed{4.5\cdot 10^{33}\text{ erg}}"],
    "7": ["#### 007"],
    "0.10": ["#### 0.1"],
    "123456789012345678901234567890": ["#### 123456789012345678901234567890"],
    "north": ["#### north", "#### North ", "north", r"\boxed{\text{North}.}"],
    "The red house": ["####   the   red\thouse"],
    "straße": ["#### STRASSE"],
    r"\text{(C)}": [r"\boxed{C}", r"\boxed{(C)}", "#### c"],
    "C": [r"\boxed{\textbf{(C)}}"],
    "5:30": ["#### 5:30"],
    r"120^\circ": [r"\boxed{120}", r"\boxed{120 \text{ degrees}}"],
    r"864 \mbox{ inches}^2": [r"\boxed{864}", r"\boxed{864\text{ square inches}}"],
    r"\$18.90": [r"\boxed{18.9}"],
    "x=5": [r"\boxed{5}"],
    "y = 2x": [r"\boxed{2x}", r"\boxed{x+x}"],
    "2x": [r"\boxed{y = 2x}"],
    r"x \in [-2,7]": [r"\boxed{[-2,7]}", r"\boxed{[-2, 14/2]}"],
    "x^{2}+1": [r"\boxed{x^{2}+1}", r"\boxed{1+x^2}"],
    r"\text{a{b}c}": [r"\boxed{\text{a{b}c}}"],
    "(1, 2)": ["#### (1, 2)", r"\boxed{\left( 1, 2 \right)}", r"\boxed{(1, \frac{4}{2})}"],
    "(8,-2)": [r"\boxed{(8,\ -2)}"],
    "52_8": [r"\boxed{52_{8}}"],
    "1+2x": [r"\boxed{2x+1}"],
    r"6\sqrt{3}": [
        r"\boxed{6\sqrt3}", r"\boxed{\sqrt{108}}", r"\boxed{6*sqrt(3)}", r"it is $6\sqrt{3}$.",
    ],
    r"\frac{\sqrt{2}}{2}": [r"\boxed{\frac{1}{\sqrt{2}}}", r"\boxed{\sqrt2/2}"],
    "288 \\pi": [r"\boxed{288\pi}", r"\boxed{288 pi}"],
    "1,-2": [r"\boxed{-2, 1}", r"\boxed{x = 1 \text{ or } x = -2}", r"\boxed{\{1, -2\}}"],
    r"1 \pm \sqrt{19}": [r"\boxed{1 - \sqrt{19}, 1 + \sqrt{19}}"],
    "(3,4]": [r"\boxed{(3, 4]}", r"\boxed{(\frac62,4]}"],
    r"(-\infty, 2) \cup (3, \infty)": [r"\boxed{(3,\infty)\cup(-\infty,2)}"],
    "6-5i": [r"\boxed{-5i + 6}"],
    r"1+\sqrt{3} i": [r"\boxed{1 + i\sqrt{3}}"],
    r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}": [
        r"\boxed{\begin{pmatrix} -\frac{1}{3} \\ \frac{2}{3} \end{pmatrix}}",
        r"\boxed{\begin{bmatrix}-1/3\\2/3\end{bmatrix}}",
    ],
    r"y^{\prime}+r y=0": [r"\boxed{y' + ry = 0}"],
    "5x - 7y + 11z + 4 = 0": [r"\boxed{-5x + 7y - 11z - 4 = 0}"],
    "k \\geqslant 2": [r"\boxed{k \ge 2}"],
    "f(x)=x,f(x)=-x": [r"\boxed{f(x) = -x \text{ and } f(x) = x}"],
    r"5 + 2 makes $\boxed{7}$.": [r"\boxed{7}", r"5 + 2 makes $\boxed{7}$.", "7"],
    "5 + 2 = 7\n#### 7": ["#### 7", "7.0"],
    "$69$,$84$": [r"\boxed{84 \text{ and } 69}"],
}  # fmt: skip
WRONG = {  # answer: completions
    "72": [
        "", "no number at all", "####", "#### ", r"\boxed{}", "#### 73", "72\n#### 73",
        r"\boxed{73} #### 72", "#### 720", "#### 7.2", "#### -72", "#### 72.0000001",
        "__import__('os').getpid()", "#### 8*9", "#### nan", "#### inf", "#### 1e999999999",
        r"\boxed{72} \boxed{73}", r"\boxed{8\cdot 9}", r"\boxed{73-1}", r"\boxed{72 or 73}",
        r"\boxed{72, 73}", r"\boxed{72\text{ or }73}", r"\boxed{72 apples and 3 pears}",
    ],
    "3": [
        r"\boxed{6\sqrt{3}}", r"\boxed{x=3 or 5}", r"\boxed{3x}", r"\boxed{3\pi}", r"\boxed{3i}",
        r"\boxed{3+x}", r"\boxed{x>3}", r"\boxed{[3,\infty)}", r"\boxed{\{3,4\}}", r"\boxed{3!}",
        r"\boxed{f(3)}", r"\boxed{\frac{3}{4}}", r"\boxed{3 \text{ million}}", r"\boxed{\pm 3}",
        r"\boxed{3_5}", r"\boxed{3:1}", r"\boxed{0.\overline{3}}", r"\boxed{3, \ldots}",
        r"\boxed{3 \pmod 5}", r"\boxed{\begin{pmatrix}3\\4\end{pmatrix}}", r"\boxed{1 2}",
        r"\boxed{not 3}", r"\boxed{3a}", r"\boxed{3\text{x}}", r"\boxed{3m}", r"\boxed{3^{2}}",
        r"it is $6\sqrt{3}$.", r"it is \(x^3\).", "$x+3$", r"\boxed{(x+1)^2=3}", r"\boxed{x-y=3}",
    ],
    "6": [r"\boxed{6_8}", r"\boxed{6{,}000}", "#### 6 or 7", r"\boxed{3 3}", r"\boxed{6m}"],
    "9": [r"\boxed{(4, 9)}", "it is (4, 9).", r"\boxed{4, 9}"],
    "5": [r"\boxed{10^{5}}", r"so $10^{5}$", "#### 5:30", "#### 30:5"],
    "-5": ["(3+7)-5", r"\boxed{(3+7)-5}", "[2]-5", r"\sqrt{4}-5"],
    "400": [r"\boxed{2{,}400}"],
    "78": [r"\boxed{\frac78}"],
    "8.6": [r"\boxed{4\frac{3}{5}}"],
    "2.4": [r"\boxed{4\frac{3}{5}}"],
    "123456789012345678901234567890": ["#### 123456789012345678901234567891"],
    "0.3": ["#### 0.30000000000000004", "#### 0.30000000000000000001"],  # float: equal
    "100": ["#### 1,00", "#### 10**2"],
    "0": ["#### 1/0", r"\boxed{5x-7y=0}", r"\boxed{1-1}"],
    "12": [r"\boxed{1 2}", r"\boxed{1, 2}"],
    "0.333333": ["#### 1/3"],
    "north": ["#### south", "north #### south", "72", r"\boxed{thorn}"],
    "even": [r"\boxed{neve}", r"\boxed{odd}"],
    "no": [r"\boxed{on}"],
    "B": [r"\boxed{A}", r"\boxed{AB}", r"\boxed{(A) or (B)}"],
    "5:30": ["#### 5", "#### 1/6", "#### 6:30"],
    "6m": [r"\boxed{6}"],
    "52_8": [r"\boxed{52}", r"\boxed{52_9}", r"\boxed{42}"],
    r"6\sqrt{3}": [r"\boxed{6}", r"\boxed{3}", r"\boxed{\sqrt{3}}", r"\boxed{6\sqrt{2}}"],
    "x=5": [r"\boxed{x=6}", r"\boxed{x>5}"],
    "y = 2x + 3": [r"\boxed{2x}", r"\boxed{3}", r"\boxed{y = 3x + 2}"],
    "1,-2": [r"\boxed{1}", r"\boxed{-2}", r"\boxed{1, 2}", r"\boxed{1, -2, 3}"],
    "(1, 2)": [r"\boxed{(2, 1)}", r"\boxed{[1, 2]}", r"\boxed{(1, 2, 3)}", r"\boxed{2}"],
    "(3,4]": [r"\boxed{[3,4]}", r"\boxed{(3,4)}"],
    r"1 \pm \sqrt{19}": [r"\boxed{1 + \sqrt{19}}", r"\boxed{1}"],
    "6-5i": [r"\boxed{6+5i}", r"\boxed{6-5}", r"\boxed{6}"],
    "y'+y=0": [r"\boxed{y+y=0}"],
    r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}": [
        r"\boxed{\begin{pmatrix} 2/3 \\ -1/3 \end{pmatrix}}", r"\boxed{-1/3}",
        r"\boxed{\begin{pmatrix} -1/3 & 2/3 \end{pmatrix}}",
    ],
    r"50\%": [r"\boxed{.5}"],
    r"5 + 2 makes $\boxed{7}$.": [r"\boxed{5}", "2"],
    "1e999999999": ["#### 72"],
    "7" * 102: ["#### " + "7" * 101],
}  # fmt: skip


def cases(table):
    return [(completion, answer) for answer, row in table.items() for completion in row]


@pytest.mark.parametrize("completion, answer", cases(RIGHT))
def test_right(completion, answer):
    assert is_correct(completion, answer)


@pytest.mark.parametrize("completion, answer", cases(WRONG))
def test_wrong(completion, answer):
    assert not is_correct(completion, answer)


@pytest.mark.parametrize("answer", [*RIGHT, *WRONG])
def test_the_gold_itself_is_right(answer):
    gold = gold_answer(answer)
    for completion in (answer, gold, f"#### {gold}", rf"so \boxed{{{gold}}}."):
        assert is_correct(completion, answer)


def test_the_extracted_answer():
    assert extract_answer(r"so \boxed{ \frac{1}{2} } m") == r"\frac{1}{2}"
    assert extract_answer(r"so \boxed{\left\{ 1, 2 \right.} m") == r"\left\{ 1, 2 \right."
    assert extract_answer("9\n#### 8 apples\n7") == "8 apples"
    assert extract_answer("from 5 to $1,234.5.") == "1,234.5"
    assert extract_answer("(3+7)-5") == "5"
    assert extract_answer("so $2^{10}$, as I said") == "2^{10}"
    assert extract_answer("none") is None


# ---- no text stops a run ----


@pytest.mark.parametrize(
    "piece",
    [
        "1", "-", ",", "$", "{", "}", " ", "\n", "#", "1,", "1,111", "1/", "1.e", "e", "\\frac{",
        "\\boxed{", "\\boxed{}", "\\frac{1}{2}", "####", "+1", "(", "\\", "1e9", "٣", "\u2212",
        "\\text{", "\\(", "$\\", "(1,",
    ],
)  # fmt: skip
def test_a_long_text_of_anything_takes_linear_time(piece):
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    for completion in (text, "\\boxed{" + text, "\\boxed{" + text[:400] + "}"):
        is_correct(completion, "72")
    is_correct("#### " + text, text)
    assert time.process_time() - start < 10  # a quadratic rule would take minutes


def test_an_exponent_is_never_written_out():
    start = time.process_time()
    for text in ("1e999999999", "-1e-999999999", "1e9999/3", "9" * 4999 + "e99999"):
        is_correct(f"#### {text}", text)
        is_correct(f"#### {text}", "72")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "text",
    ["9^{9^{9^{9}}}", "(" * 240 + "x" + ")" * 240, "\x00x", "\ud800x", "\\"],
    ids=lambda text: ascii(text)[:20],
)
def test_mathematics_without_an_end_is_wrong_in_time(text):
    """Not even one that is stuck in a single operation on integers, or in the parser."""
    start = time.perf_counter()
    assert not is_correct(rf"so $\boxed{{{text} }}$", "x+1")
    assert is_correct(text, text)
    assert is_correct(r"\boxed{1+x}", "x+1")  # and the next one is judged
    assert time.perf_counter() - start < 20


def test_nothing_is_evaluated_as_code(tmp_path):
    target = tmp_path / "made"
    for code in (f"open('{target}','w')", f"__import__('os').mkdir('{target}')"):
        for text in (code, rf"x + {code}", rf"\sqrt[{code}]{{2}}"):
            is_correct(rf"\boxed{{{text}}}", "x+1")
            is_correct(r"\boxed{x+1}", text)
            symbolic.same_mathematics(text, "x+1")
    assert not target.exists()


def test_threads_get_their_own_verdicts():
    verdicts = {}

    def judge(i):
        verdicts[i] = [is_correct(rf"\boxed{{{j}+x^{i}}}", f"x^{i}+{i}") for j in range(4)]

    threads = [threading.Thread(target=judge, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)  # a verdict that another thread took never comes
    assert verdicts == {i: [j == i for j in range(4)] for i in range(4)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_does_not_use_its_parents_process():
    assert is_correct(r"\boxed{1+x}", "x+1")
    child = os.fork()
    if child == 0:
        right = is_correct(r"\boxed{z+x}", "x+z") and not is_correct(r"\boxed{x-2}", "2-x")
        os._exit(0 if right and os.getpid() in symbolic.PROCESSES else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert is_correct(r"\boxed{y+x}", "x+y") and not is_correct(r"\boxed{y-x}", "x-y")


def test_it_ends_with_the_run_and_not_with_a_signal():
    process = symbolic.start()
    process.terminate()
    process.stdin.write('["1+x", "x+1"]\n')
    process.stdin.flush()
    assert process.stdout.readline() == "True\n"
    process.communicate(timeout=20)  # closes its stdin
    assert process.returncode == 0


def test_math_verify_is_missing(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(symbolic, "PROCESSES", {})
    with pytest.raises(UserError, match="math-verify cannot be imported: pip install -r req"):
        is_correct(r"\boxed{1+w}", "w+1")


def test_the_library_stays_out_of_this_process():
    assert is_correct(r"\boxed{1+x}", "x+1") and "math_verify" not in sys.modules
