"""What alpha, the threshold and the std do to GPG's update: `python extras/alpha.py`.

Written down before the results: which outcome would refute which claim of the GPG paper.

1. Eq. 7: the mean over all groups is an inaccurate gradient, and alpha corrects it. Refuted as a
   matter of direction if the expected updates with and without alpha point the same way.
2. Section 3: dividing by the std is a bias that removing it cures. Refuted if the expected update
   with F_norm = std points the same way as the gradient of the success rate.
3. Table 1: alpha is worth 3.9 points. Refuted for the toy if, each arm at its own best learning
   rate, alpha does not beat alpha = 1; not due to its adaptivity if the constant mean of alpha, or
   its mean at each step, does as well.
4. Table 9: stopping at beta_th is cheaper than filling the batch with valid groups (DAPO). Refuted
   if the variance of the update times its cost is not lower.

The first part is exact. A prompt of kind k is solved with probability p_k = sigmoid(theta_k), and
the B prompts of a batch are drawn independently. With s of G completions right, a group's gradient
for theta_k is mean_i A_i (r_i - p_k) = mean_i A_i r_i, because the A_i add up to 0. Every s and
every number of valid groups V is enumerated, so nothing is sampled.

The second part trains a logistic policy, p(prompt) = sigmoid(w x + b_x), on prompts of which a
share is dead for good (always right or always wrong), for every optimizer, B, learning rate and
arm. Twenty seeds, paired: the arms see the same prompts and the same random numbers. The best
learning rate of an arm is chosen on ten of them and reported on the other ten.
"""

import argparse
import sys
from math import comb
from pathlib import Path

import numpy as np
import torch
from shared import markdown, mean_and_error

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpg import group_advantages
from run import Parser, plain_errors

G, CAP = 8, 20  # completions per prompt, rounds per step at most
P = np.array([0.02, 0.1, 0.5, 0.95])  # success rates of the four kinds of prompts

# --------------------------------------------------------------------------------------------------
# Exact
# --------------------------------------------------------------------------------------------------


def binomial(n: int, p) -> np.ndarray:
    """p [...] -> the probabilities of 0 .. n successes, [..., n + 1]."""
    s, p = np.arange(n + 1), np.asarray(p)[..., None]
    return np.array([comb(n, k) for k in s], float) * p**s * (1 - p) ** (n - s)


def group_gradients(f_norm: str, G: int = G) -> np.ndarray:
    """The gradient [G + 1] of a group with s = 0 .. G right completions, by its own theta."""
    rewards = torch.tril(torch.ones(G + 1, G, dtype=torch.float64), -1)  # row s has s ones
    return (group_advantages(rewards, f_norm) * rewards).mean(1).numpy()


def valid_groups(v: float, B: int, need: float, cap: int = CAP) -> tuple[np.ndarray, float]:
    """Sample rounds of B groups, each valid with probability v, until V >= need or the cap ->
    the distribution of V, [cap * B + 1], and the expected number of groups sampled."""
    still, stopped, groups = np.array([1.0]), np.zeros(cap * B + 1), 0.0
    for round in range(cap):
        groups += B * still.sum()
        still = np.convolve(still, binomial(B, v))
        done = np.arange(len(still)) >= need if round < cap - 1 else np.full(len(still), True)
        stopped[: len(still)] += still * done
        still = still * ~done
    return stopped, groups


def update(p: np.ndarray, B: int, f_norm="1", alpha=True, beta_th=0.0, keep=np.inf, G=G) -> dict:
    """Moments of a step's update U [K] for a batch of prompts of K kinds, each equally likely.

    U = f(V) times the mean over the V valid groups: f = 1 with alpha, V / B without. `keep` drops
    valid groups beyond that number (DAPO keeps B).
    -> mean [K], variance (its trace), groups sampled, groups updated.
    """
    K, pmf, g = len(p), binomial(G, p), group_gradients(f_norm, G)  # [K, G + 1], [G + 1]
    ends = pmf[:, [0, -1]].sum(1)  # dead: all wrong or all right
    v = (1 - ends).mean()
    mean = (pmf * g).sum(1) / K / v  # E[g e_k | valid], [K]
    square = (pmf * g**2).sum() / K / v  # E[|g e_k|^2 | valid]
    weight, groups = valid_groups(v, B, beta_th * B)
    weight, V = weight[1:], np.minimum(np.arange(1, len(weight)), keep)  # V = 0: no update
    f = np.ones(len(V)) if alpha else V / B
    first, second = (weight * f).sum(), (weight * f**2).sum()
    within = (weight * f**2 / V).sum() * (square - (mean**2).sum())
    variance = within + (second - first**2) * (mean**2).sum()
    updated = (weight * V).sum()
    return {"mean": first * mean, "variance": variance, "sampled": groups, "updated": updated}


def update_of_sorted_batches(p: np.ndarray, B: int, alpha: bool) -> np.ndarray:
    """The mean update [K] if every batch has prompts of one kind only."""
    return np.array([update(p[[k]], B, alpha=alpha)["mean"][0] for k in range(len(p))]) / len(p)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def exact_tables(B: int) -> str:
    """Direction, length, variance and cost of the update for each arm, as Markdown."""
    true = P * (1 - P) / len(P)  # gradient of the mean success rate
    arms = {
        "alpha = 1": update(P, B, alpha=False),
        "alpha": update(P, B),
        "alpha, beta_th = .6": update(P, B, beta_th=0.6),
        "all valid (DAPO's sampling)": update(P, B, beta_th=1.0, keep=B),
        "F = std, alpha = 1": update(P, B, "std", alpha=False),
        "F = std, alpha": update(P, B, "std"),
    }
    means = {name: arm["mean"] for name, arm in arms.items()}
    means["batches of one kind, alpha = 1"] = update_of_sorted_batches(P, B, alpha=False)
    means["batches of one kind, alpha"] = update_of_sorted_batches(P, B, alpha=True)
    rows = [["expected update", "cosine", *(f"weight of p = {p:g}" for p in P)]]
    for name, mean in means.items():
        weights = mean / true  # 1: as in the true gradient
        rows.append([name, f"{cosine(mean, true):.4f}", *(f"{w:.3f}" for w in weights)])
    text = markdown(rows)
    ratios = (1, 4, 16)  # seconds to sample a group / seconds to update with it
    costs = [f"noise x seconds, {r} : 1" for r in ratios]
    rows = [["noise of the update", "noise", "sampled", "noise x sampled", *costs]]
    for name, arm in arms.items():
        noise = arm["variance"] / (arm["mean"] ** 2).sum()
        seconds = [(r * arm["sampled"] + arm["updated"]) / (r + 1) for r in ratios]
        cells = [f"{noise:.3f}", f"{arm['sampled']:.0f}", f"{noise * arm['sampled']:.2f}"]
        rows.append([name, *cells, *(f"{noise * s:.2f}" for s in seconds)])
    return f"{text}\n\n{markdown(rows)}"


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

ARMS = ["alpha = 1", "alpha", "its mean", "its mean per step"]
DRIFTS = {"constant": (0.6, 0.6), "rising": (0.1, 0.9), "falling": (0.9, 0.1)}  # share of dead
RATES = {"SGD": 2.0 ** np.arange(-4, 13), "AdamW": 2.0 ** np.arange(-9, 6)}
SEEDS, STEPS, FEATURES = 20, 60, 8


class Prompts:
    """The prompts and random numbers that all arms of a setting share; a prompt is (x, b_x)."""

    def __init__(self, B: int, drift: str):
        rng = np.random.default_rng(0)
        goal = rng.normal(size=FEATURES)

        def draw(*shape: int) -> tuple[np.ndarray, np.ndarray]:
            x = rng.normal(size=(*shape, FEATURES))
            x *= np.sign(x @ goal)[..., None]  # so w = goal, and more of it, solves every prompt
            return x, rng.normal(-1.5, 1.5, size=shape)

        self.x, self.b = draw(STEPS, SEEDS, B)
        self.test_x, self.test_b = draw(1000)
        self.u = rng.random((STEPS, SEEDS, B, G))
        share = np.linspace(*DRIFTS[drift], STEPS)[:, None, None]
        self.dead = rng.random((STEPS, SEEDS, B)) < share


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(x / 2)


def train(prompts: Prompts, optimizer: str, factor=None) -> tuple[np.ndarray, np.ndarray]:
    """All learning rates and seeds at once -> success rate on the test prompts [rates, seeds], and
    alpha at each step [STEPS, rates, seeds], NaN where every group is dead (no step is taken).

    factor multiplies the gradient, broadcast to [STEPS, rates, seeds]; None: alpha.
    """
    lr, g = RATES[optimizer][:, None, None], group_gradients("1")
    w = np.zeros((len(lr), SEEDS, FEATURES))
    m, v, t = np.zeros_like(w), np.zeros_like(w), np.zeros((len(lr), SEEDS, 1))  # Adam's
    alphas = np.full((STEPS, len(lr), SEEDS), np.nan)
    for step in range(STEPS):
        x, b = prompts.x[step], prompts.b[step]  # [SEEDS, B, FEATURES], [SEEDS, B]
        p = sigmoid(np.einsum("sbf,rsf->rsb", x, w) + b)  # [rates, SEEDS, B]
        p[:, prompts.dead[step]] = 0
        s = (prompts.u[step] < p[..., None]).sum(-1)  # right completions of each group
        B, V = s.shape[-1], ((s > 0) & (s < G)).sum(-1, keepdims=True)  # V [rates, SEEDS, 1]
        alpha = B / np.maximum(V, 1)
        alphas[step] = np.where(V > 0, alpha, np.nan)[..., 0]
        grad = np.einsum("rsb,sbf->rsf", g[s], x) / B
        grad *= alpha if factor is None else np.broadcast_to(factor, alphas.shape)[step][..., None]
        live = V > 0
        if optimizer == "SGD":
            w += live * lr * grad
        else:  # torch.optim.AdamW's defaults, without weight decay
            t += live
            m = np.where(live, 0.9 * m + 0.1 * grad, m)
            v = np.where(live, 0.999 * v + 0.001 * grad**2, v)
            corrected = np.sqrt(v / (1 - 0.999 ** np.maximum(t, 1)))
            w += live * lr * m / (1 - 0.9 ** np.maximum(t, 1)) / (corrected + 1e-8)
    logits = np.einsum("pf,rsf->rsp", prompts.test_x, w) + prompts.test_b
    return sigmoid(logits).mean(-1), alphas


def train_arms(B: int, drift: str, optimizer: str) -> dict[str, np.ndarray]:
    """{arm: success rate at the end [rates, seeds]}."""
    prompts = Prompts(B, drift)
    ends = {"alpha = 1": train(prompts, optimizer, 1.0)[0]}
    ends["alpha"], alphas = train(prompts, optimizer)
    alphas = np.ma.masked_invalid(alphas)
    means = alphas.mean(2, keepdims=True).filled(1.0)  # [STEPS, rates, 1], over the seeds
    ends["its mean"] = train(prompts, optimizer, alphas.mean((0, 2))[:, None].filled(1.0))[0]
    ends["its mean per step"] = train(prompts, optimizer, means)[0]
    return ends


def training_row(ends: dict[str, np.ndarray]) -> list[str]:
    """Each arm at its best rate; then what alpha adds to alpha = 1, each at its best rate, and both
    at the rate where alpha = 1 has learned half of what it can. The rates are chosen on the
    first ten seeds, the values come from the others."""
    half = SEEDS // 2
    chosen = {arm: values[:, :half].mean(1) for arm, values in ends.items()}  # [rates]
    best = {arm: values.argmax() for arm, values in chosen.items()}
    cells = [mean_and_error(ends[arm][best[arm], half:]) for arm in ARMS]
    one = chosen["alpha = 1"]
    slow = abs(one - (one[0] + one.max()) / 2)[: best["alpha = 1"]].argmin()
    for i, j in ((best["alpha"], best["alpha = 1"]), (slow, slow)):
        cells.append(mean_and_error((ends["alpha"][i] - ends["alpha = 1"][j])[half:], "+"))
    return cells


def draw(results: dict, path: Path) -> None:
    """Success rate at the end against the learning rate: a row per optimizer and B, a column per
    drift. results: {(optimizer, B, drift): {arm: [rates, seeds]}}."""
    from matplotlib.figure import Figure  # slow to import

    settings = list(dict.fromkeys(key[:2] for key in results))
    figure = Figure(figsize=(11, 2.4 * len(settings)), layout="constrained")
    axes = figure.subplots(len(settings), 3, sharey=True)
    for (optimizer, B), row in zip(settings, axes, strict=True):
        for drift, axis in zip(DRIFTS, row, strict=True):
            for arm, style in zip(ARMS, ("k-", "C3-", "C0--", "C2:"), strict=True):
                values = results[optimizer, B, drift][arm]
                mean, error = values.mean(1), values.std(1, ddof=1) / SEEDS**0.5
                axis.errorbar(RATES[optimizer], mean, error, fmt=style, lw=1.5, label=arm)
            axis.set(xscale="log", title=f"{optimizer}, B = {B}, share of dead {drift}")
            axis.title.set_fontsize(9)
        row[0].set_ylabel("success rate at the end")
    for axis in axes[-1]:
        axis.set_xlabel("learning rate")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=80)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("alpha.py", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("--out", type=Path, default=Path("runs/alpha.png"), help="the figure")
    args = parser.parse_args(argv)
    print(f"A batch of B = 16 groups of {G}, exact\n\n{exact_tables(16)}\n")
    gains = ["alpha - (alpha = 1)", "the same, at a low rate"]
    results, rows = {}, [["optimizer, B, share of dead", *ARMS, *gains]]
    for optimizer in RATES:
        for B in (16, 144):
            for drift in DRIFTS:
                ends = results[optimizer, B, drift] = train_arms(B, drift, optimizer)
                rows.append([f"{optimizer}, {B}, {drift}", *training_row(ends)])
    print(f"Success rate after {STEPS} steps, each arm at its best rate\n\n{markdown(rows)}\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(results, args.out)
    print(args.out)


if __name__ == "__main__":
    with plain_errors("alpha.py"):
        main()
