"""CoPG's toy bandit: section 5 and figure 1 of Flet-Berliac et al. 2024 (arXiv 2406.19185v1).

Three arms, a data set of pairs collected by two bad policies, and no further interaction. Which
loss recovers the policy that maximises reward minus KL? CoPG does. Policy gradient with the wrong
baseline does not, and IPO converges to something else.

    R_b(y)   = R(y) - b ln(pi(y) / ref(y)), the reward regularised with strength b        eq. 1
    J(pi)    = E_pi[R_beta] = E_pi[R] - beta KL(pi || ref), to maximise                   eq. 2
    pi*      = ref exp(R / beta) / Z                                                      eq. 29
    l_CoPG   = (R_{beta/2}(y) - R_{beta/2}(y')) (h(y) - h(y')),  h = ln(pi / ref)         eq. 7-9
             = [dR^2 - (dR - beta dh)^2] / (2 beta),  d: difference of the two, to maximise

    python bandit_toy.py                     a table, regret.csv and figure1.png, in half a minute
    python bandit_toy.py --lr 1e-3           the paper's rate: from zero logits Adam is too slow
    python bandit_toy.py --labels ranked     the better arm always wins, as in section 6
"""

import functools
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from run import Parser, parse_flags, plain_errors, positive_float, positive_int
from tasks import UserError

R = (2.5, 2.0, 1.0)  # rewards of the A = 3 arms
MU = ((0.1, 0.2, 0.7), (0.05, 0.05, 0.9))  # mu1 and mu2, the policies that collected y and y'
REF, BETA = (1 / 3, 1 / 3, 1 / 3), 0.5
N_PAIRS, BATCH_SIZE = 10_000, 512

# --------------------------------------------------------------------------------------------------
# The bandit and its exact solution
# --------------------------------------------------------------------------------------------------


class ThreeArmedBandit(gymnasium.Env):
    """One step: pull arm 0, 1 or 2 and receive its reward. There is nothing to observe."""

    action_space = gymnasium.spaces.Discrete(3)
    observation_space = gymnasium.spaces.Discrete(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        return 0, R[action], True, False, {}


def f64(x) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def optimal_policy(rewards=R, ref=REF, beta: float = BETA) -> Tensor:
    """pi* [A] (eq. 29)."""
    return (f64(ref).log() + f64(rewards) / beta).softmax(-1)


def objective(policy, rewards=R, ref=REF, beta: float = BETA) -> Tensor:
    """J of policies [..., A] -> [...] (eq. 2)."""
    policy = f64(policy)
    kl = torch.xlogy(policy, policy / f64(ref)).sum(-1)
    return (policy * f64(rewards)).sum(-1) - beta * kl


def regret(policy, rewards=R, ref=REF, beta: float = BETA) -> Tensor:
    """J(pi*) - J(policy) >= 0 of policies [..., A] -> [...]."""
    best = objective(optimal_policy(rewards, ref, beta), rewards, ref, beta)
    return best - objective(policy, rewards, ref, beta)


# --------------------------------------------------------------------------------------------------
# The losses, side by side
# --------------------------------------------------------------------------------------------------


class PairBatch:
    """What a loss may look at, for pairs of arms y and y' [..., n]; names in _ belong to y'.

    logits [..., A] are the policy's, wins [..., n] is True where y is preferred, and mu holds mu1
    and mu2, from which y and y' were drawn.
    """

    def __init__(self, logits, y, y_, wins, rewards=R, ref=REF, beta=BETA, mu=MU):
        rewards, mu1, mu2 = f64(rewards), f64(mu[0]), f64(mu[1])  # [A]
        log_pi = logits.log_softmax(-1)  # [..., A]
        log_ratio = log_pi - f64(ref).log()
        pi = log_pi.detach().exp()
        regularised = rewards - beta * log_ratio.detach()  # R_beta of every arm (eq. 1)
        self.beta = beta
        self.r, self.r_ = rewards[y], rewards[y_]
        self.rb, self.rb_ = regularised.gather(-1, y), regularised.gather(-1, y_)
        self.logp, self.logp_ = log_pi.gather(-1, y), log_pi.gather(-1, y_)  # ln pi
        self.h, self.h_ = log_ratio.gather(-1, y), log_ratio.gather(-1, y_)  # ln pi / ref
        self.w, self.w_ = pi.gather(-1, y) / mu1[y], pi.gather(-1, y_) / mu2[y_]  # pi / mu
        self.value = (pi * rewards).sum(-1, keepdim=True)  # E_pi[R]
        self.value_kl = (pi * regularised).sum(-1, keepdim=True)  # E_pi[R_beta] = J(pi)
        self.margin = torch.where(wins, self.h - self.h_, self.h_ - self.h)  # preferred - other


def copg_loss(p):  # eq. 7-10 and 17, as a square, minimised; l itself is maximised
    return ((p.r - p.r_) - p.beta * (p.h - p.h_)) ** 2 / (2 * p.beta)


def pg_loss(p):  # eq. 23-24 with b = 0: off-policy policy gradient without a baseline
    return -(p.rb * p.logp + p.rb_ * p.logp_)


def pg_value_loss(p):  # eq. 23-24 with b = E_pi[R], as in section 5
    return -((p.rb - p.value) * p.logp + (p.rb_ - p.value) * p.logp_)


def pg_value_kl_loss(p):  # eq. 23-24 with b = E_pi[R_beta], as in section 2: it finds pi* too
    return -((p.rb - p.value_kl) * p.logp + (p.rb_ - p.value_kl) * p.logp_)


def is_loss(p):  # eq. 5-6, importance sampling: the classical remedy; needs mu and adds variance
    return -(p.w * (p.rb - p.value_kl) * p.logp + p.w_ * (p.rb_ - p.value_kl) * p.logp_)


def rloo_loss(p):  # eq. 65-66: what CoPG is on-policy; y and y_ are fresh samples of pi
    return -((p.rb - p.rb_) * p.logp + (p.rb_ - p.rb) * p.logp_)


def ipo_loss(p):  # eq. 21-22: preferences only; regresses beta * margin to 1/2
    return (0.5 - p.beta * p.margin) ** 2


def dpo_loss(p):  # Rafailov et al. 2023 (arXiv 2305.18290), eq. 7
    return -logsigmoid(p.beta * p.margin)


LOSSES = {
    "copg": copg_loss, "pg": pg_loss, "pg-value": pg_value_loss, "ipo": ipo_loss,
    "pg-value-kl": pg_value_kl_loss, "is": is_loss, "rloo": rloo_loss, "dpo": dpo_loss,
}  # fmt: skip
PAPER = ["copg", "pg", "pg-value", "ipo"]  # the four curves of figure 1; the others are ours

# --------------------------------------------------------------------------------------------------
# Training, and its limit without sampling
# --------------------------------------------------------------------------------------------------


def collect(policy, n: int, rng: np.random.Generator, env: gymnasium.Env) -> tuple:
    """n episodes with a fixed policy -> arms [n], rewards [n]."""
    arms = rng.choice(len(policy), size=n, p=policy)
    rewards = []
    for arm in arms:
        env.reset()
        rewards.append(env.step(arm)[1])
    return arms, np.array(rewards)


@functools.cache  # every method learns from the same data
def data_set(seeds: tuple[int, ...], n_pairs: int, labels: str) -> tuple[Tensor, Tensor, Tensor]:
    """y, y' and wins, [S, n_pairs] each. labels: "sampled" from Bradley-Terry, as in section 5, or
    "ranked": the better arm always wins, as where a reward model ranks the pairs (section 6)."""
    env, rows = ThreeArmedBandit(), []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        y, r = collect(MU[0], n_pairs, rng, env)
        y_, r_ = collect(MU[1], n_pairs, rng, env)
        wins = rng.random(n_pairs) < 1 / (1 + np.exp(r_ - r))  # sigmoid(R(y) - R(y'))
        if labels == "ranked":
            wins = r > r_
        rows.append((y, y_, wins))
    return tuple(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))


def train_policies(method: str, seeds=range(10), epochs=100, lr=5e-3, labels="sampled") -> Tensor:
    """Adam from zero logits -> policies at the start and after each epoch, [epochs + 1, S, A]."""
    y, y_, wins = data_set(tuple(seeds), N_PAIRS, labels)  # [S, N_PAIRS]
    generator = torch.Generator().manual_seed(seeds[0])
    logits = torch.zeros(len(seeds), len(R), dtype=torch.float64, requires_grad=True)  # [S, A]
    optimizer = torch.optim.Adam([logits], lr=lr, fused=True)
    policies = [logits.detach().softmax(-1)]
    for _ in range(epochs):
        for batch in torch.randperm(N_PAIRS, generator=generator).split(BATCH_SIZE):  # [n]
            arms, arms_ = y[:, batch], y_[:, batch]  # [S, n]
            if method == "rloo":  # on-policy: fresh arms in place of the data
                pi = logits.detach().softmax(-1)
                arms, arms_ = pi.multinomial(2 * len(batch), True, generator=generator).chunk(2, 1)
            loss = LOSSES[method](PairBatch(logits, arms, arms_, wins[:, batch]))  # [S, n]
            optimizer.zero_grad()
            loss.mean(1).sum().backward()  # each seed is an independent run
            optimizer.step()
        policies.append(logits.detach().softmax(-1))
    return torch.stack(policies)


def train(method: str, seeds=range(10), epochs=100, lr=5e-3, labels="sampled") -> np.ndarray:
    """The regret at the start and after each epoch, [epochs + 1, S]."""
    return regret(train_policies(method, seeds, epochs, lr, labels)).numpy()


def expected_loss(method, logits, rewards=R, ref=REF, beta=BETA, mu=MU, labels="sampled") -> Tensor:
    """The mean loss of logits [A] over all pairs and both preferences, enumerated: y ~ mu1 and
    y' ~ mu2, or for rloo both from the policy, with no gradient through the sampling."""
    A = len(rewards)
    y, y_ = torch.cartesian_prod(torch.arange(A), torch.arange(A)).T.repeat(1, 2)  # [2 A^2]
    wins = torch.arange(2 * A * A) < A * A
    batch = PairBatch(logits, y, y_, wins, rewards, ref, beta, mu)
    margin = torch.where(wins, batch.r - batch.r_, batch.r_ - batch.r)  # in reward
    preference = margin.sigmoid() if labels == "sampled" else (margin.sign() + 1) / 2
    pi = logits.detach().softmax(-1)
    mu1, mu2 = (pi, pi) if method == "rloo" else (f64(mu[0]), f64(mu[1]))
    return (mu1[y] * mu2[y_] * preference * LOSSES[method](batch)).sum()


def expected_gradient(method: str, logits: Tensor, **problem) -> Tensor:
    """The gradient [A] of the expected loss."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(expected_loss(method, logits, **problem), logits)[0]


def limit(method: str, steps: int = 1500, lr: float = 1.0, rewards=R, **problem) -> Tensor:
    """The policy [A] where gradient descent on the expected loss ends, from zero logits."""
    if method == "dpo" and problem.get("labels") == "ranked":  # margins grow without bound
        return f64([r == max(rewards) for r in rewards])
    logits = torch.zeros(len(rewards), dtype=torch.float64)
    for _ in range(steps):
        logits = logits - lr * expected_gradient(method, logits, rewards=rewards, **problem)
    return logits.softmax(-1)


# --------------------------------------------------------------------------------------------------
# Table and figure
# --------------------------------------------------------------------------------------------------


def draw_figure(policies: dict[str, Tensor], limits: dict[str, Tensor], path: Path) -> None:
    """Regret over epochs, of the paper's methods (with their range) and of ours; final policies."""
    from matplotlib.figure import Figure  # slow to import

    floor = 1e-5  # zero cannot be shown on a log axis
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    paper, ours, final = figure.subplots(1, 3)
    for i, method in enumerate(policies):
        axis, color = paper if method in PAPER else ours, f"C{i}"
        curve = regret(policies[method]).clamp(min=floor).numpy()  # [epochs + 1, S]
        axis.plot(curve.mean(1), color=color, ls="-" if i % 2 else "--", lw=1.8, label=method)
        axis.axhline(max(float(regret(limits[method])), floor), color=color, ls=":", lw=0.8)
        axis.legend(frameon=False, fontsize=9)
        if method in PAPER:
            axis.fill_between(range(len(curve)), curve.min(1), curve.max(1), color=color, alpha=0.2)
    for axis, title in ((paper, "the paper's four (its figure 1)"), (ours, "four more, means")):
        axis.set(title=title, xlabel="epoch", yscale="log", ylim=(floor / 1.5, 1.5))
    paper.set_ylabel(f"regret J(pi*) - J(pi), at least {floor:g}; dotted: limits")
    for arm, shade in enumerate(("#333333", "#999999", "#dddddd")):
        x = np.arange(len(policies)) + 0.27 * (arm - 1)
        heights = [float(policy[-1, :, arm].mean()) for policy in policies.values()]
        final.bar(x, heights, 0.26, color=shade, label=f"arm {arm}, reward {R[arm]:g}")
        final.axhline(float(optimal_policy()[arm]), color="black", ls=":", lw=0.8)
    final.set(title="final policies, means over seeds; dotted: pi*", ylim=(0, 1.05))
    final.set_xticks(range(len(policies)), policies, fontsize=8, rotation=30)
    final.legend(frameon=False, fontsize=8, ncol=3, loc="upper center")
    figure.savefig(path, dpi=80)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("bandit_toy.py", description="CoPG's toy bandit, figure 1 of the paper.")
    labels = "preferences for ipo and dpo: from Bradley-Terry, or by reward (default: sampled)"
    add = parser.add_argument
    add("--methods", nargs="+", choices=LOSSES, default=list(LOSSES), help="losses (default: all)")
    add("--lr", type=positive_float, default=5e-3, help="of Adam (default: 5e-3; paper: 1e-3)")
    add("--epochs", type=positive_int, default=100, help="passes over the data (default: 100)")
    add("--seeds", type=positive_int, default=10, help="number of independent runs (default: 10)")
    add("--labels", choices=["sampled", "ranked"], default="sampled", help=labels)
    add("--out", help="directory, new or empty (default: runs/bandit_toy, -2, -3, ...)")
    parser.set_defaults(resume=None)  # nothing to resume
    args = parse_flags(parser, argv, defaults=lambda args: {})
    if args.labels == "ranked" and not {"ipo", "dpo"} & set(args.methods):
        raise UserError("--labels ranked has no effect: only ipo and dpo use labels")
    out, seeds = Path(args.out), range(args.seeds)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; name another")
    torch.set_num_threads(1)  # the tensors are small
    policies, limits, rows = {}, {}, ["method,seed,epoch,regret"]
    table = ["method         regret      sd    limit   final policy          in the limit"]
    for method in tqdm(args.methods, unit="method"):
        policies[method] = train_policies(method, seeds, args.epochs, args.lr, args.labels)
        limits[method] = limit(method, labels=args.labels)
        curve = regret(policies[method]).numpy()  # [epochs + 1, S]
        rows += [f"{method},{seed},{epoch},{x:.8g}" for (epoch, seed), x in np.ndenumerate(curve)]
        last, exact = curve[-1], float(regret(limits[method]))
        verdict = "biased" if exact < regret(REF) else "worse than the start"
        if exact < 1e-6:  # what `limit` leaves of 0
            verdict = "optimal"
        policy = " ".join(f"{x:.4f}" for x in policies[method][-1].mean(0))
        numbers = f"{last.mean():8.4f} {last.std():7.4f} {exact:8.4f}"
        table.append(f"{method:12} {numbers}   {policy:21} {verdict}")
    (out / "regret.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    files = "regret.csv, figure1.png"
    try:  # the table does not need the figure
        draw_figure(policies, limits, out / "figure1.png")
    except Exception as error:  # without matplotlib, for example
        files = f"regret.csv; no figure1.png: {error!r:.200}"
    print(f"J(pi*) = {objective(optimal_policy()):.6f}, J(ref) = {objective(REF):.6f}")
    print(*table, f"see {out}: {files}", sep="\n")


if __name__ == "__main__":
    with plain_errors("bandit_toy.py"):
        main()
