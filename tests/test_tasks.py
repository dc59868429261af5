"""The tasks, the Gymnasium contract, files, and the tiny models' cache."""

import math
import random
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from helpers import write_jsonl

import common
from tasks import (
    Posts,
    TextTask,
    UserError,
    cache_dir,
    first_problem,
    get_prompts,
    get_rewards,
    held_out,
    is_correct,
    make_task,
    tiny,
)
from tasks.addition import FLAWLESS
from tasks.episodes import TaskError
from tasks.jsonl import read_records
from tasks.posts import PREFERENCES

# ---- addition ----


def slips(task, index):
    """How far off each column of a demonstration is."""
    work = task.demonstration(index).split(" =")[0].split(" ")
    return [eval(left) - int(total) for left, total in (column.split("=") for column in work)]


def test_demonstrations_are_flawless_and_then_right_half_of_the_time():
    task = make_task("add").unwrapped

    def right(task, first):
        shown = range(first, first + 2000)
        return sum(is_correct(task.demonstration(i), task.problem(i)[1]) for i in shown) / 2000

    assert right(task, 0) == right(task, FLAWLESS - 2000) == 1
    assert 0.45 < right(task, FLAWLESS) < 0.55
    assert right(make_task("add-hard").unwrapped, 0) == 1
    assert right(make_task("add-hard").unwrapped, FLAWLESS) < 0.2


def test_a_slip_is_in_one_digit_or_carry_and_what_follows_is_consistent():
    task, kinds = make_task("add").unwrapped, {"digit": 0, "carry": 0}
    for index in range(FLAWLESS, FLAWLESS + 1000):
        wrong = [off for off in slips(task, index) if off]
        right = is_correct(task.demonstration(index), task.problem(index)[1])
        assert len(wrong) == (not right)
        for off in wrong:
            kinds["carry" if abs(off) == 10 else "digit"] += 1
    assert 200 < kinds["digit"] < 300 and 200 < kinds["carry"] < 300
    hard = make_task("add-hard").unwrapped
    offs = [off != 0 for i in range(FLAWLESS, FLAWLESS + 500) for off in slips(hard, i)]
    assert 0.75 < sum(offs) / len(offs) < 0.85


@pytest.mark.parametrize("digits", range(1, 7))
def test_sums_have_up_to_so_many_digits(digits):
    task, lengths = make_task(f"add{digits}").unwrapped, set()
    for index in range(200):
        prompt, answer = task.problem(index)
        a, b = prompt.rstrip("=").split("+")
        lengths |= {len(a), len(b)}
        assert int(a) + int(b) == int(answer)
    assert lengths == set(range(1, digits + 1))
    assert digits != 3 or make_task("add").unwrapped.problem(5) == task.problem(5)


# ---- Gymnasium ----


def test_train_and_test_share_no_problem():
    for name, facts in (("add", lambda p: p[0]), ("posts", lambda p: p[1].split(" ; ")[0])):
        splits = [make_task(name, split).unwrapped for split in ("train", "test")]
        train, test = ({facts(task.problem(i)) for i in range(1000)} for task in splits)
        assert not train & test and len(train) > 700 and len(test) > 300


def test_problems_are_the_same_in_every_process():
    """What decides the split may not be hash(), which is salted."""
    for split, problem in (("train", ("6+480=", "486")), ("test", ("8+22=", "30"))):
        assert make_task("add", split).unwrapped.problem(7) == problem
    assert make_task("posts", "test").unwrapped.problem(7)[1].startswith("my mother copied my bike")


def test_the_seed_names_the_problem():
    task = make_task("add")
    assert task.reset(seed=7) == task.reset(seed=7) == (task.unwrapped.problem(7)[0], {})
    assert len({task.reset(seed=i)[0] for i in range(50)}) > 45
    assert len({task.reset()[0] for _ in range(50)}) > 45  # without a seed, a random one


def test_an_episode_has_one_step():
    task = make_task("add")
    with pytest.raises(gymnasium.error.ResetNeeded):
        task.step("too early")
    prompt, _ = task.reset(seed=3)
    answer = task.unwrapped.problem(3)[1]
    assert task.step(f"#### {answer}") == (prompt, 1.0, True, False, {"answer": answer})
    task.reset(seed=3)
    assert task.step("#### x")[1] == 0


@pytest.mark.parametrize("name", ["add", "add6", "add-hard", "count", "posts", "gsm8k"])
def test_gymnasium_contract(name, gsm8k_files):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*alternative render modes.*")
        check_env(make_task(name, "test").unwrapped)


@pytest.mark.parametrize(
    "name",
    [
        "ad", "add0", "add7", "add:", "no_such_module:X-v0", "NoSuch-v0", "", ":add", "a:b:c",
        "./my_tasks:T-v0", ".my_tasks:T-v0", "../my_tasks:T-v0",
    ],
)  # fmt: skip
def test_unknown_tasks(name):
    with pytest.raises(UserError, match=f"^--task {name}: not a task such as"):
        make_task(name)


OWN_TASK = """
import gymnasium
import numpy as np

class Count(gymnasium.Env):
    observation_space = action_space = gymnasium.spaces.Text(100)

    def reset(self, *, seed=None, options=None):
        self.n = np.random.RandomState(seed).randint(10)
        return f"write {self.n} a's", {}

    def step(self, completion):
        off = abs(completion.count("a") - self.n)
        return "", -float(off), True, False, {"solved": off == 0}

gymnasium.register("Count-v0", entry_point=Count)
"""


def test_a_plain_environment_of_ones_own(tmp_path, monkeypatch):
    """It knows no splits and no problems: the seed alone makes problem i the same."""
    (tmp_path / "count_tasks.py").write_text(OWN_TASK)
    monkeypatch.chdir(tmp_path)
    task = make_task("count_tasks:Count-v0", "test")
    prompts = get_prompts(task, [3, 4, 3])
    assert prompts[0] == prompts[2]
    n = [int(prompt.split()[1]) for prompt in prompts]
    completions = ["a" * n[0], "a" * (n[0] + 2), "a" * (n[1] + 1), "a" * n[1]]
    rewards, solved = get_rewards(task, [3, 4], completions)
    assert rewards.tolist() == [[0, -2], [-1, 0]]
    assert solved.tolist() == [[True, False], [False, True]]
    assert held_out(task, 3) == [[0, 1, 2]]  # without a size, as many as are asked for
    with pytest.raises(UserError, match="Count has none: give it a method demonstration"):
        tiny.tiny_model(task)


def own_task(constructor) -> str:
    """The constructor's name as a task."""
    gymnasium.registry.pop("Own-v0", None)
    gymnasium.register("Own-v0", entry_point=constructor)
    return "Own-v0"


class Seeds(gymnasium.Env):
    """Prompts that tell the seed."""

    def reset(self, *, seed=None, options=None):
        return f"{seed}", {}


def test_no_run_trains_on_demonstrations_or_on_the_test():
    """Whatever --seed and --eval-first are; and NumPy's seeds are below 2**32."""
    starts = [first_problem(seed) for seed in range(10**6 + 1)]
    assert starts[:200] == list(range(10**7, 201 * 10**7, 10**7)) and min(starts) == 10**7
    ends = max(starts) + 10**8
    train, test = (make_task(own_task(Seeds), split) for split in ("train", "test"))
    seeds = [int(x) for x in get_prompts(test, [0, 2 * 10**9])]  # as far as the flags reach
    assert ends < min(seeds) and max(seeds) < 2**32
    assert get_prompts(train, [0, ends]) == ["0", f"{ends}"]
    assert test.reset()[0] == "None"  # no seed, no offset


class Split(Seeds):
    def __init__(self, split="train", fails=False):
        self.split = split
        if split == "test" and fails:
            len(None)


class Inherited(Split):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize(
    "constructor", [Split, Inherited, lambda split: Split(split), f"{__name__}:Split"]
)
def test_who_takes_a_split_gets_one(constructor):
    for split in ("train", "test"):
        task = make_task(own_task(constructor), split)
        assert task.unwrapped.split == split and get_prompts(task, [5]) == ["5"]


@pytest.mark.parametrize("constructor", [Seeds, lambda: Seeds(), f"{__name__}:Seeds"])
def test_who_takes_no_split_gets_other_seeds(constructor):
    prompts = [get_prompts(make_task(own_task(constructor), x), [5]) for x in ("train", "test")]
    assert prompts == [["5"], [f"{2**31 + 5}"]]


def test_a_type_error_of_the_constructor_is_not_a_lack_of_splits(capsys):
    name = own_task(lambda split: Split(split, fails=True))
    make_task(name)
    with pytest.raises(TypeError, match="object of type 'NoneType' has no len"):
        make_task(name, "test")
    assert capsys.readouterr().err == "the task failed while it was made:\n"


BROKEN = {  # the source of a module: the exception that its user sees
    "import": SyntaxError,
    "1 / 0": ZeroDivisionError,
    "raise SystemExit": TaskError,
    "open('no such file')": TaskError,
    "import gymnasium; gymnasium.register('T-v0', entry_point=__name__ + ':Nope')": AttributeError,
    "import gymnasium; gymnasium.register('T-v0', entry_point=lambda: 1)": TypeError,
    "import gymnasium; gymnasium.register('T-v0', entry_point=lambda: 1 / 0)": ZeroDivisionError,
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_task_that_cannot_be_made(source, tmp_path, monkeypatch, capsys):
    module = f"broken_{list(BROKEN).index(source)}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(gymnasium.registry, "T-v0", raising=False)
    with pytest.raises(BROKEN[source]):
        make_task(f"{module}:T-v0")
    assert capsys.readouterr().err == "the task failed while it was made:\n"


# ---- rewards ----


def test_rewards_stay_with_their_prompts():
    task = make_task("add")
    problems = [5, 6, 7]
    answers = [task.unwrapped.problem(i)[1] for i in problems]
    completions = [f"#### {a}" for a in answers for _ in range(2)]
    completions[1] = completions[4] = "#### x"
    rewards, solved = get_rewards(task, problems, completions)
    assert rewards.tolist() == [[1, 0], [1, 1], [0, 1]] and rewards.dtype == torch.float32
    assert torch.equal(solved, rewards > 0)


def test_solved_is_what_the_task_says():
    task = make_task("add")
    task.unwrapped.reward = lambda completion, answer: float(completion)
    step = task.unwrapped.step
    assert get_rewards(task, [1], ["1", "0", "-1"])[1].tolist() == [[True, False, False]]
    task.unwrapped.step = lambda x: (*step(x)[:4], {"solved": x != "1"})
    assert get_rewards(task, [1], ["1", "0", "-1"])[1].tolist() == [[False, True, True]]


class Odd(TextTask):
    """One prompt; the reward is given, or raised."""

    def __init__(self, reward, prompts=("p",), terminated=True, info=None):
        super().__init__()
        self.given, self.prompts, self.terminated = reward, list(prompts), terminated
        self.info = {} if info is None else info

    def problem(self, index):
        prompt = self.prompts.pop(0) if len(self.prompts) > 1 else self.prompts[0]
        if isinstance(prompt, BaseException):
            raise prompt
        return prompt, "a"

    def step(self, completion):
        if isinstance(self.given, BaseException):
            raise self.given
        return self.prompt, self.given, self.terminated, False, self.info


@pytest.mark.parametrize(
    "reward",
    [
        None, "1", "", [], [1.0], {}, 1j, object(), math.nan, math.inf, -math.inf, 1e39, 10**400,
        np.array([1.0, 2.0]), np.array(["a"]), np.float64("nan"), torch.tensor([1.0, 2.0]),
        torch.tensor(math.nan),
    ],
    ids=lambda reward: repr(reward)[:20],
)  # fmt: skip
def test_a_reward_that_is_no_finite_number_is_refused(reward):
    with pytest.raises(UserError, match=r"^problem 5 .* reward .* for 'xyz': not a finite number$"):
        get_rewards(Odd(reward), [5], ["xyz"])


@pytest.mark.parametrize(
    "reward", [1, 0.25, -0.25, True, np.float32(0.5), np.int64(3), torch.tensor(0.5)], ids=repr
)
def test_a_reward_may_be_any_finite_number(reward):
    rewards, solved = get_rewards(Odd(reward), [5], ["x", "y"])
    assert rewards.tolist() == [[float(reward)] * 2] and solved.tolist() == [[reward > 0] * 2]


@pytest.mark.parametrize("solved", [True, 1, 1.0, np.bool_(True), np.int64(1), torch.tensor(True)])
def test_solved_may_be_any_scalar_that_is_true_or_false(solved):
    for value, expected in ((solved, True), (solved * 0, False)):
        assert get_rewards(Odd(0.5, info={"solved": value}), [5], ["x"])[1].item() is expected
    assert get_rewards(Odd(1.0, terminated=solved), [5], ["x"])[0].item() == 1


@pytest.mark.parametrize(
    "task, message",
    [
        (Odd(1.0, ["p", "q"]), r"has another prompt after another reset\(seed=5\)"),
        (
            Odd(1.0, [{"image": np.zeros(3), "text": "p"}, {"image": np.ones(3), "text": "p"}]),
            "has another prompt after another reset",
        ),
        (Odd(1.0, terminated=False), "does not terminate after one step"),
        (Odd(1.0, terminated=np.array([True, True])), "does not terminate after one step"),
        (Odd(1.0, [""]), "has the prompt '': not a text"),
        (Odd(1.0, [7]), "has the prompt 7: not a text"),
        (Odd(1.0, ["half \ud800"]), r"has the prompt 'half \\ud800': not a text"),
        (Odd(1.0, [{"image": 0, "text": "\udfff"}]), "has the prompt {.*}: not a text"),
        (Odd(1.0, [{"text": "p"}]), "has the prompt {.*}: not a text"),
        (gymnasium.make("CartPole-v1"), "has the prompt array.*: not a text"),
        (Odd(1.0, info=[]), r"has the info \[\]: not a dict"),
        (Odd(1.0, info=False), "has the info False: not a dict"),
        (Odd(1.0, info={"solved": np.array([1, 0])}), r"'solved': array\(\[1, 0\]\), not a bool"),
        (Odd(1.0, info={"solved": "no"}), "'solved': 'no', not a bool"),
        (Odd(1.0, info={"solved": None}), "'solved': None, not a bool"),
        (Odd(1.0, info={"solved": 0.5}), "'solved': 0.5, not a bool"),
    ],
)
def test_a_task_that_breaks_its_contract_is_refused(task, message, capsys):
    with pytest.raises(UserError, match=f"^problem 5 of the task .*{message}"):
        get_rewards(task, [5], ["x", "y"])
    assert not capsys.readouterr().err


@pytest.mark.parametrize("size", ["5", 5.0, [5], 0, -1])
def test_a_size_that_is_no_number_of_problems_is_refused(size):
    task = make_task("add")
    task.unwrapped.size = size
    for use in (lambda: held_out(task, 3), lambda: tiny.tiny_model(task)):
        with pytest.raises(UserError, match=r"the task has the size .*: not a number of problems"):
            use()
    task.unwrapped.size = np.int64(2)
    assert held_out(task, 3) == [[0, 1]]


FAILURES = {  # what a task raises: what its user sees. Scripts explain the others as their own.
    ZeroDivisionError("mine"): ZeroDivisionError,
    OSError("mine"): TaskError,
    RuntimeError("mine, out of memory"): TaskError,
    MemoryError("mine"): TaskError,
    SystemExit("mine"): TaskError,
}


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_where_a_task_of_ones_own_fails_is_said_and_its_exception_is_seen(failure, capsys):
    for task, where in (
        (Odd(failure), "problem 5, completion 'xyz':"),
        (Odd(1.0, [failure]), "problem 5:"),
    ):
        with pytest.raises(FAILURES[failure], match="mine") as seen:
            get_rewards(task, [5], ["xyz"])
        assert failure in (seen.value, seen.value.__cause__)
        assert capsys.readouterr().err == f"the task failed at {where}\n"
    for error in (UserError("no key"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            get_rewards(Odd(error), [5], ["xyz"])
        assert not capsys.readouterr().err


# ---- files ----


@pytest.fixture
def gsm8k_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (cache_dir() / "gsm8k").mkdir(parents=True)
    for split, n in (("train", 20), ("test", 5)):
        records = [
            {"question": f"{split}: {i} and 1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n"
             f"#### {i + 1}"} for i in range(n)
        ]  # fmt: skip
        write_jsonl(cache_dir() / "gsm8k" / f"{split}.jsonl", *records)


def test_gsm8k(gsm8k_files):
    wrapped = make_task("gsm8k")
    task, test = wrapped.unwrapped, make_task("gsm8k", "test").unwrapped
    epochs = [[task.problem(i) for i in range(n, n + 20)] for n in (0, 20)]
    assert epochs[0] != epochs[1]  # another order, the same problems
    assert set(epochs[0]) == set(epochs[1]) and len(set(epochs[0])) == 20 == task.size
    prompt, answer = task.problem(5)
    assert "boxed" in prompt and prompt.startswith(f"train: {int(answer) - 1} and 1?")
    assert task.demonstration(5) == f"{int(answer) - 1}+1={answer}\n#### {answer}"
    assert [test.problem(i)[1] for i in range(5)] == ["1", "2", "3", "4", "5"]
    assert get_rewards(wrapped, [5], [rf"\boxed{{{answer}}}", "no"])[0].tolist() == [[1, 0]]
    assert held_out(make_task("gsm8k", "test"), 200) == [[0, 1, 2, 3, 4]]
    assert held_out(make_task("gsm8k", "test"), 200, 3) == [[3, 4]]
    with pytest.raises(UserError, match="--eval-first 5: there are only 5 held-out problems"):
        held_out(make_task("gsm8k", "test"), 200, 5)
    batches = held_out(make_task("add", "test"), 130)
    assert batches == [list(range(64)), list(range(64, 128)), [128, 129]]
    assert held_out(make_task("add", "test"), 66, 5) == [list(range(5, 69)), [69, 70]]


RECORDS = [{"prompt": f"p{i}", "answer": i} for i in range(30)]


def test_one_file_is_split(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", *RECORDS)
    train, test = (make_task(path, split) for split in ("train", "test"))
    assert [test.problem(i)[0] for i in range(3)] == ["p0", "p10", "p20"]
    assert {train.problem(i)[0] for i in range(27)} == {f"p{i}" for i in range(30) if i % 10}
    assert test.problem(1) == ("p10", "10") and (train.size, test.size) == (27, 3)
    twice = [{"prompt": f"p{i % 15}", "answer": i} for i in range(30)]
    path = write_jsonl(tmp_path / "twice.jsonl", *twice)
    train, test = (make_task(path, split) for split in ("train", "test"))
    problems = [test.problem(i) for i in range(4)]
    assert problems == [("p0", "0"), ("p10", "10"), ("p0", "15"), ("p10", "25")]
    assert (train.size, test.size) == (26, 4)
    only = write_jsonl(tmp_path / "only.jsonl", {"prompt": "p", "answer": "Apollo 11"})
    assert make_task(only).problem(0) == make_task(only, "test").problem(0) == ("p", "Apollo 11")


@pytest.mark.parametrize("seed", [0, 1, 7, 99, 200, 10**6])
def test_a_pass_is_a_pass(seed, tmp_path):
    """Counted from where a run starts, each one has every record once, in an order of its own."""
    path = write_jsonl(tmp_path / "mine.jsonl", *RECORDS)
    task, first = make_task(path), first_problem(seed)
    assert task.size == 27
    passes = [[task.problem(first + 27 * k + i)[0] for i in range(27)] for k in range(4)]
    assert [sorted(a_pass) for a_pass in passes] == [sorted(passes[0])] * 4
    assert len(set(passes[0])) == 27 and len(set(map(tuple, passes))) == 4
    other = [task.problem(first_problem(seed + 1) + i)[0] for i in range(27)]
    assert sorted(other) == sorted(passes[0]) and other != passes[0]
    assert [task.reset(seed=first + i)[0] for i in range(27)] == passes[0]


def test_line_separators_and_a_byte_order_mark_are_text(tmp_path):
    path = tmp_path / "mine.jsonl"
    text = '{"prompt": "a\u2028b", "answer": "c"}\r\n\n{"question": "d", "answer": 1}'
    path.write_bytes(text.encode("utf-8-sig"))
    assert [(r.prompt, r.answer) for r in read_records(path)] == [("a\u2028b", "c"), ("d", "1")]


def test_null_counts_as_absent(tmp_path):
    records = [
        {"prompt": "a", "question": None, "answer": 1, "image": None, "images": None},
        {"prompt": None, "question": "b", "answer": 2},
    ]
    path = write_jsonl(tmp_path / "mine.jsonl", *records)
    assert [(r.prompt, r.answer) for r in read_records(path)] == [("a", "1"), ("b", "2")]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        (r'{"prompt": "\ud800", "answer": 1}', "not a JSON object .*surrogates"),
        ('{"prompt": "a", "answer": ' + "7" * 5000 + "}", "not a JSON object .*digits"),
        ('{"answer": 1}', "needs a text under 'prompt'"),
        ('{"prompt": " ", "answer": 1}', "needs a text under 'prompt'"),
        ('{"prompt": 5, "answer": 1}', "needs a text under 'prompt'"),
        ('{"prompt": "a"}', "needs a text or a finite number"),
        ('{"prompt": "a", "answer": ""}', "needs a text or a finite number"),
        ('{"prompt": "a", "answer": null}', "needs a text or a finite number"),
        ('{"prompt": "a", "answer": true}', "needs a text or a finite number"),
        ('{"prompt": "a", "answer": NaN}', "needs a text or a finite number"),
        ('{"prompt": "a", "answer": -Infinity}', "needs a text or a finite number"),
        ('{"prompt": "a", "answer": 1e400}', "needs a text or a finite number"),
        ('{"prompt": null, "answer": 1}', "needs a text under 'prompt'"),
        ('{"prompt": "a", "answer": 1, "images": ["b.png", "c.png"]}', "needs one picture"),
        ('{"prompt": "a", "answer": 1, "images": []}', "needs one picture"),
        ('{"prompt": "a", "answer": 1, "images": "b.png"}', "needs one picture"),
        ('{"prompt": "a", "answer": 1, "images": ["b"], "image": "b"}', "needs one picture"),
        ('{"prompt": "a", "answer": 1, "images": [{"bytes": "b"}]}', "needs the path of a picture"),
        ('{"prompt": [], "answer": 1}', "needs at least one message"),
        ('{"messages": [{"role": "user"}], "answer": 1}', "not a message with a role and a text"),
        ('{"messages": ["a"], "answer": 1}', "not a message with a role and a text"),
        ('{"messages": [{"role": 1, "content": "a"}], "answer": 1}', "not a message with a role"),
        (
            '{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": 1}',
            "not a message with a role and a text",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}], "answer": 1}',
            "its messages end with an answer",
        ),
        (
            '{"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],'
            ' "image": "c.png", "answer": 1}',
            "needs one text beside its picture, not 2 messages",
        ),
    ],
    ids=lambda text: text[:40],
)
def test_bad_records_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match="bad.jsonl, line 2: " + message):
        make_task(str(path))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"), (b"\n \n", "no records"), (b"", "no records"),
        (b'{"prompt": "\xe9", "answer": 1}', "not UTF-8"),
    ],
)  # fmt: skip
def test_other_bad_files(tmp_path, content, message):
    path = tmp_path / "some.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"some\.jsonl: .*{message}"):
        make_task(str(path))


# ---- posts ----


def test_utility_by_hand():
    """The worth of each fact, the cost of words, of repeated facts and of anything else."""
    answer = "my boss lost my bike ; in the park ; because of a bet ; should i pay them"
    utility = Posts().reward
    assert utility(answer, answer) == pytest.approx(4.2 - 0.1 * 16)
    assert utility("my boss lost my bike", answer) == pytest.approx(2 - 0.5)
    assert utility("in the park ; in the park", answer) == pytest.approx(0.6 - 0.6)
    assert utility("because of a bet", answer) == pytest.approx(0.6 - 0.4)
    assert utility("should i pay them", answer) == pytest.approx(1 - 0.4)
    assert utility("in the zoo", answer) == pytest.approx(-1 - 0.3)
    assert utility("my boss lost my bike ; thanks for reading", answer) == pytest.approx(0.2)
    assert utility("", answer) == -1


def test_the_facts_stand_in_the_post():
    task = Posts("test")
    for i in range(100):
        post, answer = task.problem(i)
        event, place, cause, ask = answer.split(" ; ")
        for fact in (f"{event} .", f"it happened {place} .", f"it was {cause} .", f"{ask} ?"):
            assert fact in post
        assert post.endswith("summary :") and len(set(answer.split(" ; "))) == 4


def test_writers_are_of_mixed_quality():
    """Summaries by good and bad writers have utilities far apart."""
    task = Posts()
    utilities = torch.tensor(
        [task.reward(task.write(i, w), task.problem(i)[1]) for i in range(500) for w in (1, 2)]
    )
    assert -0.5 < utilities.mean() < 1 and utilities.std() > 1.5 and utilities.max() > 2.5
    assert task.write(3, 1) == task.write(3, 1) != task.write(3, 2)
    assert task.demonstration(3) == task.write(3, 0)


def test_preferences_follow_bradley_terry():
    """The preferred summary is the better one as often as the utilities say."""
    task, expected, seen, first = Posts(), [], [], 0
    for i in range(1500):
        prompt, pair = task.preference(i)
        problem, answer = task.problem(i + PREFERENCES)  # on posts of their own
        assert prompt == problem
        written = [task.write(i + PREFERENCES, writer) for writer in (1, 2)]
        assert sorted(pair) == sorted(written)
        margin = task.reward(pair[0], answer) - task.reward(pair[1], answer)
        expected.append(1 / (1 + math.exp(-abs(margin))))
        seen.append(float(margin > 0) + 0.5 * (margin == 0))
        first += pair == written
    assert sum(seen) / 1500 == pytest.approx(sum(expected) / 1500, abs=0.03)
    assert 650 < first < 850  # neither writer is the better one


def test_every_word_of_the_world_is_one_token():
    task = Posts()
    tokenizer = tiny.tiny_tokenizer(task.words)
    for i in range(200):
        text = task.problem(i)[0] + " " + " ; ".join(task.preference(i)[1])
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert 150 < len(tokenizer) < 400


# ---- tiny models ----


def test_tiny_tokenizer_writes_every_text():
    tokenizer = tiny.tiny_tokenizer()
    for text in ("47+85=", "a  b\n\tc", "naïve – ½ 漢字 🙂", " leading", "don't"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and len(ids) == len(text.encode()) and max(ids) < 256


def test_the_warm_start_learns_the_completions_and_their_eos(small, monkeypatch):
    """Against the full log-softmax of one unpadded row at a time; no row is seen twice."""
    model, tokenizer = small
    task, steps = make_task("add").unwrapped, []
    monkeypatch.setitem(tiny.WARM_START, "tokens_per_step", 100)
    monkeypatch.setattr(tiny, "fit", lambda *arguments: steps.append(arguments))
    tiny.warm_start(model, tokenizer, task)
    _, batch_loss, *settings = steps[0]
    assert settings[:2] == [tiny.WARM_START["steps"], tiny.WARM_START["lr"]]
    index = 0
    for step in range(3):
        losses, tokens = [], 0
        while tokens < 100:
            prompt = tokenizer(task.problem(index)[0]).input_ids
            completion = [*tokenizer(task.demonstration(index)).input_ids, 256]
            row = torch.tensor(prompt + completion)
            logprobs = model(row[None]).logits[0].log_softmax(-1)
            losses += [-logprobs[t - 1, row[t]] for t in range(len(prompt), len(row))]
            tokens, index = tokens + len(row), index + 1
        torch.testing.assert_close(batch_loss(step), torch.stack(losses).mean())
    assert index > 6


def test_fit_is_adamw_with_clipped_gradients_warm_up_and_a_cosine():
    targets = torch.randn(14, 2)  # of all signs; some gradients are clipped, some are not
    ours, theirs = (torch.nn.Linear(1, 2, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())

    def loss(model, step):
        return ((model.weight[:, 0] - targets[step]) ** 2).sum() / 3

    tiny.fit(ours, lambda step: loss(ours, step), steps=14, lr=0.1, name="fit")
    optimizer = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(14):
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - 2) / 12)
        optimizer.param_groups[0]["lr"] = 0.1 * (step / 2 if step < 2 else cosine)
        (theirs.weight.grad,) = torch.autograd.grad(loss(theirs, step), theirs.weight)
        theirs.weight.grad /= theirs.weight.grad.norm().clamp(min=1)
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """An empty cache, and warm starts of two small steps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tiny, "WARM_START", tiny.WARM_START | {"steps": 2, "tokens_per_step": 100})


def test_tiny_is_made_once(quick):
    task = make_task("add")
    first = Path(tiny.tiny_model(task))
    weights = first / "model.safetensors"
    stamp, content = weights.stat().st_mtime_ns, weights.read_bytes()
    assert tiny.tiny_model(task) == str(first) and weights.stat().st_mtime_ns == stamp
    assert list(cache_dir().iterdir()) == [first]  # nothing half-made is left
    first.rename(first.with_name("before"))
    assert tiny.tiny_model(task) == str(first) and weights.read_bytes() == content  # a fixed seed


def test_a_model_that_is_not_finished_is_not_cached(quick):
    def make(directory):
        directory.mkdir()
        (directory / "weights").write_text("half")
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tiny.cached_model(["recipe"], make)
        assert list(cache_dir().iterdir()) == []


def test_tiny_is_another_for_another_task_demonstration_or_recipe(quick, monkeypatch):
    paths = [tiny.tiny_model(make_task(name)) for name in ("add", "add2", "add-hard", "posts")]
    model, _ = common.load_model("tiny", "cpu")  # without a task: that of "add"
    assert model.name_or_path == paths[0] == tiny.tiny_model(make_task("add"))
    assert common.load_model("tiny", "cpu", make_task("posts"))[0].name_or_path == paths[3]
    with monkeypatch.context() as patch:
        patch.setitem(tiny.WARM_START, "lr", 1e-3)
        paths.append(tiny.tiny_model(make_task("add")))
    with monkeypatch.context() as patch:
        patch.setitem(tiny.TINY, "hidden_size", 64)
        paths.append(tiny.tiny_model(make_task("add")))
    assert len(set(paths)) == 6


def test_tiny_leaves_the_random_numbers_alone(quick):
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    tiny.tiny_model(make_task("add"))
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]


def test_two_processes_may_make_the_same_model(quick):
    def make(directory, rival=True):
        directory.mkdir()
        if rival:  # another process begins later and is faster
            tiny.cached_model(["recipe"], lambda directory: make(directory, rival=False))
        (directory / "weights").write_text("first" if rival else "second")

    path = Path(tiny.cached_model(["recipe"], make))
    assert (path / "weights").read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("shown", [None, 5, "half \ud800"])
def test_a_demonstration_that_is_no_text_is_refused(shown):
    task = make_task("add")
    task.unwrapped.demonstration = lambda index: shown
    with pytest.raises(UserError, match=r"the demonstration of problem 0 is .*: not a text"):
        tiny.tiny_model(task)


def test_a_demonstration_that_fails_is_named(capsys):
    task = make_task("add")
    task.unwrapped.demonstration = lambda index: 1 / 0
    with pytest.raises(ZeroDivisionError):
        tiny.tiny_model(task)
    assert capsys.readouterr().err == "the task failed at the demonstration of problem 0:\n"


def test_one_picture_among_texts_needs_a_model_that_sees(monkeypatch):
    task = Odd(1.0)
    task.size, task.demonstration = 3, lambda index: "a"
    for picture, family in ((None, "Llama"), ({"image": np.zeros((8, 8, 3)), "text": "?"}, "Qwen")):
        task.problem = lambda index, p=picture: (p if p and index == 2 else "p", "a")
        monkeypatch.setattr(tiny, "cached_model", lambda recipe, make: recipe[0])
        assert tiny.tiny_model(task).startswith(family)


# ---- sentences with a number of words ----


def test_exact_words():
    """The reward by hand; solved is only what has the exact number and a full stop."""
    task, test = make_task("words"), make_task("words", "test")
    for i in range(300):
        (prompt,), n = get_prompts(task, [i]), int(task.unwrapped.answer)
        assert f"with exactly {n} words." in prompt and 4 <= n <= 9
    sentences = ["a b c d e f.", "a b c d e f", "a b c.", "a b c", "a. b", "a b c d e."]
    sentences += ["", "a " * 12 + "."]
    i = next(i for i in range(99) if "exactly 6" in get_prompts(task, [i])[0])
    rewards, solved = get_rewards(task, [i], sentences)
    expected = [1, 0.5, 0.5, 0.25, 1 / 6, 5 / 6, 0, 0]
    assert rewards[0].tolist() == pytest.approx(expected)
    assert solved[0].tolist() == [True] + [False] * 7
    topics = [{get_prompts(env, [i])[0].split(" with ")[0] for i in range(2000)}
              for env in (task, test)]  # fmt: skip
    assert not topics[0] & topics[1] and (len(topics[0]), len(topics[1])) == (88, 23)
    assert "Write one short sentence about an apple" in topics[1]  # the articles are right
    assert "Write one short sentence about a bag" in topics[0]
