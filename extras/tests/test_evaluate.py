"""extras/evaluate.py and extras/ask.py: what they measure; an evaluation goes on."""

import itertools
import json

import ask
import evaluate
import pytest
import torch

from tasks import UserError


def odd_lengths(task, problems, texts):
    rewards = torch.tensor([float(len(text) % 2) for text in texts]).view(len(problems), -1)
    return rewards, rewards > 0


@pytest.fixture
def flags(model_dirs, tmp_path, monkeypatch):
    """Five problems, two to a batch, three samples each; texts of odd length are right."""
    monkeypatch.chdir(tmp_path)
    records = [{"prompt": f"{i}+1=", "answer": str(i)} for i in range(41)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    monkeypatch.setattr(evaluate, "get_rewards", odd_lengths)
    flags = f"--model {model_dirs['qwen2']} --task sums.jsonl --samples 3 --rows 6"
    return [*flags.split(), "--max-new-tokens", "8", "--device", "cpu", "--out", "e"]


def test_pass_at_k_is_the_share_of_draws():
    for n, c, k in itertools.product(range(1, 6), range(6), range(1, 6)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_the_table_by_hand():
    solved = {0: [1, 1, 0, 0], 1: [0, 0, 0, 0], 2: [1, 1, 1, 1]}
    rows = [
        {"problem": p, "greedy": False, "solved": bool(x), "tokens": 4 + p, "truncated": p == 1}
        for p, xs in solved.items()
        for x in xs
    ] + [{"problem": p, "greedy": True, "solved": p == 2, "tokens": 99} for p in solved]
    assert evaluate.summarise(rows, 4) == pytest.approx(
        {
            "problems": 3, "accuracy": 0.5, "accuracy_stderr": 0.5 / 3**0.5, "greedy": 1 / 3,
            "pass@2": (5 / 6 + 0 + 1) / 3, "pass@4": 2 / 3,
            "length": 5, "truncated": 1 / 3,
        }
    )  # fmt: skip


def test_every_completion_has_its_verdict(flags, tmp_path, capsys):
    table = evaluate.main(flags)
    lines = (tmp_path / "e/completions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 5 * 4 and [row["problem"] for row in rows if row["greedy"]] == [*range(5)]
    for row in rows:
        assert row["prompt"] == f"{10 * row['problem']}+1=" and row["tokens"] <= 8
        assert row["solved"] == bool(len(row["completion"]) % 2) == (row["reward"] > 0)
    assert 0 < sum(row["solved"] for row in rows) < len(rows)
    saved = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert saved["tasks"] == table == {"sums.jsonl": evaluate.summarise(rows, 3)}
    assert "| sums.jsonl | 5 |" in capsys.readouterr().out


@pytest.mark.parametrize("left", [0, 100, 1700, 2300])
def test_a_stopped_evaluation_goes_on(left, flags, tmp_path, monkeypatch):
    whole = evaluate.main(flags)
    path = tmp_path / "e/completions.jsonl"
    text = path.read_text()
    path.write_text(text[: left * len(text) // 2500])  # killed in the middle of a line
    drawn, answer = [], evaluate.answer
    monkeypatch.setattr(evaluate, "answer", lambda *a: (drawn.append(a[4]), answer(*a))[1])
    assert evaluate.main(flags) == whole and path.read_text() == text
    assert drawn == [[0, 1], [2, 3], [4]][left // 1000 :]
    assert evaluate.main(flags) == whole and len(drawn) == 3 - left // 1000  # it is done


def test_other_settings_need_another_directory(flags):
    evaluate.main(flags)
    with pytest.raises(UserError, match=r"^--out e was made with another --temperature: name an"):
        evaluate.main([*flags, "--temperature", "0.5"])


def test_answers_and_their_rewards(flags, capsys, monkeypatch):
    model = flags[1]
    short = ["--max-new-tokens", "4", "--samples", "3", "--device", "cpu"]
    monkeypatch.setattr(ask, "get_rewards", lambda task, p, texts: (torch.tensor([p * 3]), None))
    ask.main([model, "--task", "sums.jsonl", "--problem", "2", *short])
    out = capsys.readouterr().out
    assert out.startswith("20+1=\n") and out.count("--- reward 2") == 3
    ask.main([model, "1+1=", *short])
    assert capsys.readouterr().out.count("---") == 3
    lines = iter(["1", "2", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    ask.main([model, *short])
    assert capsys.readouterr().out.count("---") == 6
    with pytest.raises(UserError, match="a prompt and --task exclude each other"):
        ask.main([model, "1", "--task", "add"])
