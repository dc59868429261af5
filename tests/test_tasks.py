"""Tasks and the verifier: a hand-made table, hostile texts, the Gymnasium contract, files."""

import json
import time
import warnings

import gymnasium
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import common
from common import UserError, is_correct, make_task

RIGHT = [  # completion, answer
    # where the answer stands
    (r"\boxed{72}", "72"),
    (r"first \boxed{5}, then \boxed{72}", "72"),
    (r"\boxed{72} and 5 more", "72"),
    (r"#### 5 but \boxed{72}", "72"),
    (r"\boxed{72} #### 5", "72"),
    ("#### 72", "72"),
    ("#### 5\n#### 72", "72"),
    ("####72", "72"),
    ("####\n72", "72"),
    ("5 + 67\n#### 72\nthat is all, 100%", "72"),
    ("the answer is 72", "72"),
    ("5 + 67 = 72", "72"),
    ("5 + 67 = 72.", "72"),
    ("it is 72, I think", "72"),
    (r"an open \boxed{5 but #### 72", "72"),
    (r"an open \boxed{5 but 72", "72"),
    # numbers
    ("#### 72.0", "72"),
    ("#### 72", "72.00"),
    ("#### $72", "72"),
    (r"#### \$72", "72"),
    ("#### 72 dollars", "72"),
    ("#### x = 72", "72"),
    ("#### 1,000", "1000"),
    ("#### 1000", "1,000"),
    ("#### 1,234,567.5", "1234567.5"),
    ("#### 1/2", "0.5"),
    ("#### 0.5", "1/2"),
    ("#### .5", "0.5"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\dfrac{3}{4}}", "0.75"),
    (r"\boxed{-\frac{1}{2}}", "-0.5"),
    ("#### -3", "-3"),
    ("#### +3", "3"),
    ("#### \u22123", "-3"),
    ("so 5 - 8 = -3", "-3"),
    ("so 8-5", "5"),
    ("#### 50%", "50"),
    (r"\boxed{50\%}", "50"),
    ("#### 1e3", "1000"),
    ("#### 2.5E-1", "0.25"),
    ("#### 007", "7"),
    ("#### 0.1", "0.10"),
    ("#### 72.", "72"),
    ("#### 123456789012345678901234567890", "123456789012345678901234567890"),
    (r"\boxed{ 72 }", "72"),
    # other texts
    ("#### north", "north"),
    ("#### North ", "north"),
    ("####   the   red\thouse", "The red house"),
    (r"\boxed{x^{2}+1}", "x^{2}+1"),
    (r"\boxed{\text{a{b}c}}", r"\text{a{b}c}"),
    ("#### (1, 2)", "(1, 2)"),
    ("#### STRASSE", "straße"),
]
WRONG = [
    ("", "72"),
    ("no number at all", "72"),
    ("####", "72"),
    ("#### ", "72"),
    (r"\boxed{}", "72"),
    ("#### 73", "72"),
    ("72\n#### 73", "72"),
    (r"\boxed{73} #### 72", "72"),
    ("#### 720", "72"),
    ("#### 7.2", "72"),
    ("#### -72", "72"),
    ("#### 72.0000001", "72"),
    ("#### 123456789012345678901234567891", "123456789012345678901234567890"),  # float: equal
    ("#### 0.30000000000000004", "0.3"),
    ("#### 1,00", "100"),  # not a thousands separator
    ("#### 1/0", "0"),
    ("#### 1/3", "0.333333"),
    ("#### south", "north"),
    ("north #### south", "north"),
    ("72", "north"),
    ("__import__('os').getpid()", "72"),
    ("#### 8*9", "72"),
    ("#### 10**2", "100"),
    ("#### nan", "72"),
    ("#### inf", "72"),
    ("#### 1e999999999", "72"),
    ("#### 72", "1e999999999"),
    ("#### " + "7" * 101, "7" * 102),
]


@pytest.mark.parametrize("completion, answer", RIGHT)
def test_right(completion, answer):
    assert is_correct(completion, answer)


@pytest.mark.parametrize("completion, answer", WRONG)
def test_wrong(completion, answer):
    assert not is_correct(completion, answer)


@pytest.mark.parametrize(
    "piece",
    [
        "1", "-", ",", "$", "{", "}", " ", "\n", "#", "1,", "1,111", "1/", "1.e", "e", "\\frac{",
        "\\boxed{", "\\boxed{}", "\\frac{1}{2}", "####", "+1", "(", "\\", "1e9", "٣", "\u2212",
    ],
)  # fmt: skip
def test_a_megabyte_of_anything_takes_linear_time(piece):
    text = piece * (10**6 // len(piece))
    start = time.process_time()
    for completion in (text, "\\boxed{" + text):
        is_correct(completion, "72")
    is_correct("#### " + text, text)
    assert time.process_time() - start < 30  # a quadratic rule would take hours


def test_an_exponent_is_never_written_out():
    start = time.process_time()
    for text in ("1e999999999", "-1e-999999999", "1e9999/3", "9" * 4999 + "e99999"):
        is_correct(f"#### {text}", text)
        is_correct(f"#### {text}", "72")
    assert time.process_time() - start < 1


def test_add_demonstrations_are_careful_and_then_right_half_of_the_time():
    task = make_task("add")

    def right(first):
        shown = range(first, first + 2000)
        return sum(is_correct(task.demonstration(i), task.problem(i)[1]) for i in shown) / 2000

    assert right(0) == 1
    assert 0.45 < right(common.CAREFUL) < 0.55


def test_add_demonstrations_that_are_right_are_right_in_every_column():
    task = make_task("add5")
    seen = 0
    for index in range(common.CAREFUL, common.CAREFUL + 300):
        prompt, answer = task.problem(index)
        a, b = map(int, prompt.rstrip("=").split("+"))
        assert a < 10**5 and b < 10**5 and int(answer) == a + b
        work, final = task.demonstration(index).split(" =")
        columns = [column.split("=") for column in work.split(" ")]
        all_right = all(eval(left) == int(total) for left, total in columns)
        assert all_right == (int(final) == a + b)
        seen += all_right
    assert 100 < seen < 200


def test_add_slips_are_in_digits_and_in_carries():
    task, slips = make_task("add"), {"digit": 0, "carry": 0}
    for index in range(common.CAREFUL, common.CAREFUL + 1000):
        wrong = []
        for column in task.demonstration(index).split(" =")[0].split(" "):
            left, total = column.split("=")
            if eval(left) != int(total):
                wrong.append(eval(left) - int(total))
        assert len(wrong) <= 1
        for off in wrong:
            slips["carry" if abs(off) == 10 else "digit"] += 1
    assert 200 < slips["digit"] < 300 and 200 < slips["carry"] < 300


def test_train_and_test_are_disjoint_and_seeded():
    train = {make_task("add", "train").problem(i)[0] for i in range(3000)}
    test = {make_task("add", "test").problem(i)[0] for i in range(3000)}
    assert not train & test and len(train) > 2000
    first = make_task("add").reset(seed=1, options={"index": 7})[0]
    assert first == make_task("add").reset(seed=2, options={"index": 7})[0]


def test_without_an_index_the_seed_decides():
    task = make_task("add")
    prompts = [task.reset(seed=seed)[0] for seed in (1, 1, 2)]
    assert prompts[0] == prompts[1] != prompts[2]
    assert task.reset()[0] != task.reset()[0]


def test_an_episode_has_one_step():
    task = make_task("add")
    prompt, info = task.reset(options={"index": 3})
    assert info == {"index": 3}
    answer = task.problem(3)[1]
    assert task.step(f"#### {answer}") == (prompt, 1.0, True, False, {"answer": answer})
    with pytest.raises(gymnasium.error.ResetNeeded):
        task.step("once more")


@pytest.fixture
def gsm8k_dir(tmp_path):
    for split, n in (("train", 20), ("test", 5)):
        with (tmp_path / f"{split}.jsonl").open("w") as file:
            for i in range(n):
                answer = f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"
                record = {"question": f"{split}: {i} and 1?", "answer": answer}
                file.write(json.dumps(record) + "\n")
    return tmp_path


def test_gsm8k(gsm8k_dir):
    task = make_task("gsm8k", "train", str(gsm8k_dir))
    pass_1 = {task.problem(i) for i in range(20)}
    assert len(pass_1) == 20 == task.size
    assert [task.problem(i) for i in range(20)] != [task.problem(i) for i in range(20, 40)]
    assert {task.problem(i) for i in range(20, 40)} == pass_1  # another order, the same problems
    prompt, answer = task.problem(5)
    assert "boxed" in prompt and prompt.startswith(f"train: {int(answer) - 1} and 1?")
    assert task.demonstration(5) == f"{int(answer) - 1}+1={answer}\n#### {answer}"
    test = make_task("gsm8k", "test", str(gsm8k_dir))
    assert [test.problem(i)[1] for i in range(7)] == ["1", "2", "3", "4", "5", "1", "2"]


def test_one_file_is_split(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "answer": i}) + "\n" for i in range(30)))
    train, test = (make_task(str(path), split) for split in ("train", "test"))
    assert {test.problem(i)[0] for i in range(9)} == {"p0", "p10", "p20"}
    assert {train.problem(i)[0] for i in range(27)} == {f"p{i}" for i in range(30) if i % 10}
    assert test.problem(1) == ("p10", "10")


def test_line_separators_inside_a_record(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a\u2028b", "answer": "c"}\n\n{"prompt": "d", "answer": 1}\n')
    assert common.read_records(path) == [("a\u2028b", "c"), ("d", "1")]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: not a JSON object"),
        ("[1]", "line 2: not a JSON object"),
        ('{"answer": 1}', "line 2: needs a text under 'prompt'"),
        ('{"prompt": " ", "answer": 1}', "line 2: needs a text under 'prompt'"),
        ('{"prompt": 5, "answer": 1}', "line 2: needs a text under 'prompt'"),
        ('{"prompt": "a"}', "line 2: needs a text or a number under 'answer'"),
        ('{"prompt": "a", "answer": ""}', "line 2: needs a text or a number under 'answer'"),
        ('{"prompt": "a", "answer": null}', "line 2: needs a text or a number under 'answer'"),
        ('{"prompt": "a", "answer": true}', "line 2: needs a text or a number under 'answer'"),
        ("[" * 100_000, "line 2: not a JSON object"),
    ],
)
def test_bad_records_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match="bad.jsonl, " + message):
        make_task(str(path))


def test_other_bad_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl"):
        make_task(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="no records"):
        make_task(str(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9", "answer": 1}')
    with pytest.raises(UserError, match="UTF-8"):
        make_task(str(tmp_path / "latin.jsonl"))
    with pytest.raises(UserError, match=r"no train\.jsonl"):
        make_task("gsm8k", "train", str(tmp_path))


@pytest.mark.parametrize("name", ["ad", "add0", "addition", "no_such_module:X-v0", "NoSuch-v0", ""])
def test_unknown_tasks(name):
    with pytest.raises(UserError, match="--task"):
        make_task(name)


def test_data_goes_with_gsm8k_only(tmp_path):
    with pytest.raises(UserError, match="--data"):
        make_task("add", data=str(tmp_path))


def test_gymnasium_contract(gsm8k_dir):
    for task in (make_task("add"), make_task("gsm8k", "test", str(gsm8k_dir))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*alternative render modes.*")
            check_env(task)


OWN_TASK = """
import gymnasium

class Count(gymnasium.Env):
    observation_space = action_space = gymnasium.spaces.Text(100)
    metadata = {"render_modes": []}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n = int(self.np_random.integers(10))
        return f"write {self.n} a's", {}

    def step(self, completion):
        off = abs(completion.count("a") - self.n)
        return "", -float(off), True, False, {"solved": off == 0}

gymnasium.register("Count-v0", entry_point=Count)
"""


def test_a_plain_environment_of_ones_own(tmp_path, monkeypatch):
    """It knows nothing of indices and splits: the seed alone makes problem i the same."""
    (tmp_path / "count_tasks.py").write_text(OWN_TASK)
    monkeypatch.chdir(tmp_path)
    task = make_task("count_tasks:Count-v0")
    prompts = common.get_prompts(task, [3, 4, 3])
    assert prompts[0] == prompts[2]
    n = [int(prompt.split()[1]) for prompt in prompts]
    completions = ["a" * n[0], "a" * (n[0] + 2), "a" * (n[1] + 1), "a" * n[1]]
    rewards, solved = common.get_rewards(task, [3, 4], completions)
    assert rewards.tolist() == [[0, -2], [-1, 0]]
    assert solved.tolist() == [[True, False], [False, True]]
    with pytest.raises(UserError, match="demonstration"):
        common.tiny_model(task)


def test_rewards_stay_with_their_prompts():
    task = make_task("add")
    problems = [5, 6, 7]
    answers = [task.problem(i)[1] for i in problems]
    completions = [f"#### {a}" for a in answers for _ in range(2)]
    completions[1] = completions[4] = "#### x"
    rewards, _ = common.get_rewards(task, problems, completions)
    assert rewards.tolist() == [[1, 0], [1, 1], [0, 1]]


def test_a_reward_that_is_no_number_is_refused():
    class Broken(common.TextTask):
        def problem(self, index):
            return "p", "a"

        def reward(self, completion, answer):
            return float("nan")

    with pytest.raises(UserError, match="reward nan for problem 5"):
        common.get_rewards(Broken(), [5], ["x"])


def test_a_prompt_that_is_no_text_is_refused():
    with pytest.raises(UserError, match="problem 0 of the task"):
        common.get_prompts(gymnasium.make("CartPole-v1"), [0])


def test_pass_at_k():
    assert common.pass_at_k(4, 0, 2) == 0
    assert common.pass_at_k(4, 4, 1) == 1
    assert common.pass_at_k(5, 2, 1) == pytest.approx(2 / 5, abs=1e-12)
    assert common.pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10, abs=1e-12)  # 1 - C(3,3)/C(5,3)
    assert common.pass_at_k(4, 3, 2) == 1
    for bad in ((4, 5, 1), (4, 1, 5), (4, -1, 1), (4, 1, 0)):
        with pytest.raises(ValueError):
            common.pass_at_k(*bad)


def test_tiny_tokenizer_writes_every_text():
    tokenizer = common.tiny_tokenizer()
    for text in ("47+85=", "a  b\n\tc", "naïve – ½ 漢字 🙂", " leading", "don't"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.encode())
    assert torch.tensor(ids).max() < 256
