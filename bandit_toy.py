"""CoPG's toy bandit: section 5 and figure 1 of Flet-Berliac et al. 2024 (arXiv 2406.19185v1).

Three arms, a data set of pairs collected by two bad policies, and no more interaction: which loss
finds the policy that is best for reward minus KL? CoPG does. Policy gradient with the wrong
baseline does not, and IPO converges to something else.

    R_b(y)   = R(y) - b ln(pi(y) / ref(y)), the reward regularised with strength b        eq. 1
    J(pi)    = E_pi[R_beta] = E_pi[R] - beta KL(pi || ref), to maximise                   eq. 2
    pi*      = ref exp(R / beta) / Z                                                      eq. 29
    l_CoPG   = (R_{beta/2}(y) - R_{beta/2}(y')) (h(y) - h(y')),  h = ln(pi / ref)         eq. 7-9
             = [dR^2 - (dR - beta dh)^2] / (2 beta),  d: difference of the two, to maximise

    python bandit_toy.py                              a table, regret.csv and figure1.png; seconds
    python bandit_toy.py --lr 1e-3                    the paper's literal learning rate
    python bandit_toy.py --labels ranked              the better arm always wins, as in section 6

With 1e-3 Adam moves three zero logits too slowly: after 100 epochs CoPG's regret is .013. With
5e-3, the default here, every curve reaches its limit.
"""

from __future__ import annotations

import functools
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from run import Parser, plain_errors, positive_float, positive_int
from tasks import UserError

R = (2.5, 2.0, 1.0)  # rewards of the arms
MU1, MU2 = (0.1, 0.2, 0.7), (0.05, 0.05, 0.9)  # the two policies that collected the data
REF, BETA = (1 / 3, 1 / 3, 1 / 3), 0.5

# --------------------------------------------------------------------------------------------------
# The bandit, and what is exact about it
# --------------------------------------------------------------------------------------------------


class ThreeArmedBandit(gymnasium.Env):
    """One step: pull arm 0, 1 or 2 and receive its reward. There is nothing to observe."""

    def __init__(self, rewards=R):
        self.rewards = tuple(map(float, rewards))
        self.action_space = gymnasium.spaces.Discrete(len(self.rewards))
        self.observation_space = gymnasium.spaces.Discrete(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        return 0, self.rewards[action], True, False, {}


def tensor(x) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def optimal_policy(rewards=R, ref=REF, beta: float = BETA) -> Tensor:
    """pi* [A] (eq. 29)."""
    return (tensor(ref).log() + tensor(rewards) / beta).softmax(-1)


def objective(policy, rewards=R, ref=REF, beta: float = BETA) -> Tensor:
    """J of a policy [..., A] -> [...] (eq. 2)."""
    policy = tensor(policy)
    kl = torch.xlogy(policy, policy / tensor(ref)).sum(-1)
    return (policy * tensor(rewards)).sum(-1) - beta * kl


def regret(policy, rewards=R, ref=REF, beta: float = BETA) -> Tensor:
    """J(pi*) - J(policy) >= 0, [...]."""
    best = objective(optimal_policy(rewards, ref, beta), rewards, ref, beta)
    return best - objective(policy, rewards, ref, beta)


# --------------------------------------------------------------------------------------------------
# The losses, side by side
# --------------------------------------------------------------------------------------------------


class Pairs:
    """What a loss may look at, for pairs of arms y, y_ of the shape [..., n].

    logits [..., A] are the policy's; a name that ends in _ is of the second arm. mu1, mu2 are the
    probabilities with which the arms were drawn; wins is True where y is the preferred one.
    """

    def __init__(self, logits, y, y_, wins, rewards=R, ref=REF, beta=BETA, mu1=MU1, mu2=MU2):
        self.y, self.y_, self.wins, self.beta, self.mu1, self.mu2 = y, y_, wins, beta, mu1, mu2
        self.rewards = tensor(rewards)
        log_pi = logits.log_softmax(-1)  # [..., A]
        log_ratio = log_pi - tensor(ref).log()
        self.pi = log_pi.detach().exp()
        self.regularised = self.rewards - beta * log_ratio.detach()  # R_beta, [..., A] (eq. 1)
        self.r, self.r_ = self.rewards[y], self.rewards[y_]
        self.rb, self.rb_ = self.regularised.gather(-1, y), self.regularised.gather(-1, y_)
        self.logp, self.logp_ = log_pi.gather(-1, y), log_pi.gather(-1, y_)  # ln pi
        self.h, self.h_ = log_ratio.gather(-1, y), log_ratio.gather(-1, y_)  # ln pi / ref

    def value(self):  # E_pi[R]
        return (self.pi * self.rewards).sum(-1, keepdim=True)

    def value_kl(self):  # E_pi[R_beta] = J(pi)
        return (self.pi * self.regularised).sum(-1, keepdim=True)

    def weights(self):  # pi / mu of y and of y_
        weights = self.pi.gather(-1, self.y), self.pi.gather(-1, self.y_)
        return weights[0] / tensor(self.mu1)[self.y], weights[1] / tensor(self.mu2)[self.y_]

    def margin(self):  # h of the preferred arm minus h of the other
        return torch.where(self.wins, self.h - self.h_, self.h_ - self.h)


def copg_loss(p):  # eq. 7-10 and 17, as a square, minimised; l itself is maximised
    return ((p.r - p.r_) - p.beta * (p.h - p.h_)) ** 2 / (2 * p.beta)


def pg_loss(p):  # eq. 23-24 with b = 0: policy gradient off-policy, without a baseline
    return -(p.rb * p.logp + p.rb_ * p.logp_)


def pg_value_loss(p):  # eq. 23-24 with b = E_pi[R], as in section 5
    return -((p.rb - p.value()) * p.logp + (p.rb_ - p.value()) * p.logp_)


def pg_value_kl_loss(p):  # eq. 23-24 with b = E_pi[R_beta], as in section 2: it finds pi* too
    return -((p.rb - p.value_kl()) * p.logp + (p.rb_ - p.value_kl()) * p.logp_)


def is_loss(p):  # eq. 5-6: importance sampling, the classical cure; needs mu, pays in variance
    w, w_ = p.weights()
    return -(w * (p.rb - p.value_kl()) * p.logp + w_ * (p.rb_ - p.value_kl()) * p.logp_)


def rloo_loss(p):  # eq. 65-66: what CoPG is on-policy; y and y_ are fresh samples of pi
    return -((p.rb - p.rb_) * p.logp + (p.rb_ - p.rb) * p.logp_)


def ipo_loss(p):  # eq. 21-22: preferences only; regresses beta * margin to 1/2
    return (0.5 - p.beta * p.margin()) ** 2


def dpo_loss(p):  # Rafailov et al. 2023 (arXiv 2305.18290), eq. 7
    return -logsigmoid(p.beta * p.margin())


LOSSES = {
    "copg": copg_loss, "pg": pg_loss, "pg-value": pg_value_loss, "ipo": ipo_loss,
    "pg-value-kl": pg_value_kl_loss, "is": is_loss, "rloo": rloo_loss, "dpo": dpo_loss,
}  # fmt: skip
PAPER = ["copg", "pg", "pg-value", "ipo"]  # the four curves of figure 1; the others are ours

# --------------------------------------------------------------------------------------------------
# Training, and its limit without sampling
# --------------------------------------------------------------------------------------------------


def collect(policy, n: int, rng: np.random.Generator, env: gymnasium.Env) -> tuple[list, list]:
    """n episodes with a fixed policy -> arms, rewards."""
    arms = rng.choice(len(policy), size=n, p=policy).tolist()
    rewards = []
    for arm in arms:
        env.reset()
        rewards.append(env.step(arm)[1])
    return arms, rewards


@functools.cache  # all methods learn from the same data
def data_set(seeds: tuple[int, ...], pairs: int, labels: str) -> tuple[Tensor, Tensor, Tensor]:
    """y, y_ and wins [S, pairs]; the preferences are drawn once.

    labels: "sampled" by Bradley-Terry, as in section 5, or "ranked", the better arm always wins, as
    where a reward model ranks the pairs (section 6).
    """
    env, rows = ThreeArmedBandit(), []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        (y, r), (y_, r_) = collect(MU1, pairs, rng, env), collect(MU2, pairs, rng, env)
        wins = rng.random(pairs) < 1 / (1 + np.exp(np.subtract(r_, r)))  # sigmoid(R(y) - R(y'))
        if labels == "ranked":
            wins = np.greater(r, r_)
        rows.append((torch.tensor(y), torch.tensor(y_), torch.tensor(wins)))
    return tuple(torch.stack(columns) for columns in zip(*rows, strict=True))


def train(
    method: str, seeds=range(10), epochs: int = 100, lr: float = 5e-3, batch_size: int = 512,
    pairs: int = 10_000, labels: str = "sampled", policies: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Training from three zero logits with Adam -> regret after each epoch, [epochs + 1, S].

    The seeds are a dimension of the tensors: all S of them train at once. policies=True returns the
    final policies [S, A] too.
    """
    S = len(seeds)
    y, y_, wins = data_set(tuple(seeds), pairs, labels)  # [S, pairs]
    generator = torch.Generator().manual_seed(seeds[0])
    logits = torch.zeros(S, len(R), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=lr, fused=True)
    curve = [regret(logits.detach().softmax(-1))]
    for _ in range(epochs):
        for batch in torch.randperm(pairs, generator=generator).split(batch_size):  # [n]
            arms, arms_ = y[:, batch], y_[:, batch]  # [S, n]
            if method == "rloo":  # on-policy: the data are not used
                pi = logits.detach().softmax(-1)
                arms, arms_ = pi.multinomial(2 * len(batch), True, generator=generator).chunk(2, 1)
            p = Pairs(logits, arms, arms_, wins[:, batch])
            optimizer.zero_grad()
            LOSSES[method](p).mean(1).sum().backward()  # a seed has a mean and logits of its own
            optimizer.step()
        curve.append(regret(logits.detach().softmax(-1)))
    curve = torch.stack(curve).numpy()
    return (curve, logits.detach().softmax(-1).numpy()) if policies else curve


def expected_loss(
    method: str, logits, rewards=R, ref=REF, beta=BETA, mu1=MU1, mu2=MU2, labels="sampled"
) -> Tensor:
    """The mean loss of logits [A] over all pairs and both preferences, enumerated: no sampling.

    y ~ mu1, y' ~ mu2, for "rloo" both from the policy, held fixed; labels as in `data_set`.
    """
    A = len(rewards)
    y, y_ = torch.cartesian_prod(torch.arange(A), torch.arange(A)).T.repeat(1, 2)  # [2 A^2]
    wins = torch.arange(2 * A * A) < A * A
    margin = tensor(rewards)[y] - tensor(rewards)[y_]
    margin = torch.where(wins, margin, -margin)
    preference = margin.sigmoid() if labels == "sampled" else (margin.sign() + 1) / 2
    pi = logits.detach().softmax(-1)
    m1, m2 = (pi, pi) if method == "rloo" else (tensor(mu1), tensor(mu2))
    loss = LOSSES[method](Pairs(logits, y, y_, wins, rewards, ref, beta, mu1, mu2))
    return (m1[y] * m2[y_] * preference * loss).sum()


def expected_gradient(method: str, logits: Tensor, **problem) -> Tensor:
    """The gradient [A] of the expected loss."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(expected_loss(method, logits, **problem), logits)[0]


def limit(method: str, steps: int = 1500, lr: float = 1.0, **problem) -> Tensor:
    """The policy [A] where gradient descent on the expected loss ends, from zero logits."""
    if method == "dpo" and problem.get("labels") == "ranked":  # no minimum: the margins grow on
        rewards = tensor(problem.get("rewards", R))
        return (rewards == rewards.max()).double()
    logits = torch.zeros(len(problem.get("rewards", R)), dtype=torch.float64)
    for _ in range(steps):
        logits = logits - lr * expected_gradient(method, logits, **problem)
    return logits.softmax(-1)


# --------------------------------------------------------------------------------------------------
# Table and figure
# --------------------------------------------------------------------------------------------------


def verdict(limit_regret: float) -> str:
    if limit_regret < 1e-6:
        return "optimal"
    return "biased" if limit_regret < regret(REF) else "worse than the start"


def draw_figure(curves: dict, policies: dict, limits: dict, path: Path) -> None:
    """Regret over epochs with each method's limit, for the paper's four methods and for ours (mean
    over seeds, and for the paper's four the range); and the policies they end with."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    floor = 1e-5  # a logarithmic axis has no 0
    figure, (paper, ours, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for number, (method, curve) in enumerate(curves.items()):  # [epochs + 1, S]
        axis = paper if method in PAPER else ours
        look = {"color": f"C{number}", "ls": "-" if number % 2 else "--"}
        epochs, curve = np.arange(len(curve)), curve.clip(floor)
        axis.plot(epochs, curve.mean(1), **look, lw=1.8, label=method)
        axis.axhline(max(float(regret(limits[method])), floor), color=f"C{number}", lw=0.8, ls=":")
        if method in PAPER:
            axis.fill_between(epochs, curve.min(1), curve.max(1), color=f"C{number}", alpha=0.2)
    for axis, title in ((paper, "the paper's four (its figure 1)"), (ours, "four more, means")):
        axis.set(yscale="log", ylim=(floor / 1.5, 1.5), xlabel="epoch", title=title)
        if axis.lines:
            axis.legend(frameon=False, fontsize=9)
    paper.set_ylabel(f"regret J(pi*) - J(pi), at least {floor:g}; dotted: limits")
    for arm, shade in enumerate(("#333333", "#999999", "#dddddd")):
        heights = [policies[method].mean(0)[arm] for method in policies]
        positions = np.arange(len(policies)) + 0.27 * (arm - 1)
        right.bar(positions, heights, 0.26, color=shade, label=f"arm {arm}, reward {R[arm]:g}")
        right.axhline(float(optimal_policy()[arm]), color="black", lw=0.8, ls=":")
    right.set_xticks(range(len(policies)), policies, fontsize=8, rotation=30)
    right.set(title="final policies, means over seeds; dotted: pi*", ylim=(0, 1.05))
    right.legend(frameon=False, fontsize=8, ncol=3, loc="upper center")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("bandit_toy.py", description="CoPG's toy bandit, figure 1 of the paper.")
    add = parser.add_argument
    add("--methods", nargs="+", choices=LOSSES, default=list(LOSSES), help="(default: all)")
    add("--lr", type=positive_float, default=5e-3, help="of Adam (default: 5e-3; paper: 1e-3)")
    add("--epochs", type=positive_int, default=100, help="(default: 100, as the paper)")
    add("--seeds", type=positive_int, default=10, help="number of seeds (default: 10)")
    add("--labels", choices=["sampled", "ranked"], default="sampled", help="who wins, for ipo and "
        "dpo: drawn by Bradley-Terry, or the better arm (default: sampled)")  # fmt: skip
    add("--out", type=Path, default=Path("runs/bandit_toy"), help="(default: runs/bandit_toy)")
    args = parser.parse_args(argv)
    if args.labels == "ranked" and not {"ipo", "dpo"} & set(args.methods):
        raise UserError("--labels ranked does nothing: only ipo and dpo learn from labels")
    torch.set_num_threads(1)  # the tensors are small
    curves, policies, limits = {}, {}, {}
    print(f"J(pi*) = {objective(optimal_policy()):.6f}, J(ref) = {objective(REF):.6f}")
    print(f"{'method':12} {'regret':>8} {'sd':>7} {'limit':>8}   {'final policy':21} in the limit")
    for method in tqdm(args.methods, desc="methods"):
        curves[method], policies[method] = train(
            method, range(args.seeds), args.epochs, args.lr, labels=args.labels, policies=True
        )
        limits[method] = limit(method, labels=args.labels)
        last, exact = curves[method][-1], float(regret(limits[method]))
        policy = " ".join(f"{x:.4f}" for x in policies[method].mean(0))
        line = f"{method:12} {last.mean():8.4f} {last.std():7.4f} {exact:8.4f}   {policy:21} "
        tqdm.write(line + verdict(exact))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "regret.csv").open("w", encoding="utf-8") as file:
        file.write("method,seed,epoch,regret\n")
        for method, curve in curves.items():
            for (epoch, seed), value in np.ndenumerate(curve):
                file.write(f"{method},{seed},{epoch},{value:.8g}\n")
    draw_figure(curves, policies, limits, args.out / "figure1.png")
    print(f"see {args.out}: regret.csv, figure1.png")


if __name__ == "__main__":
    with plain_errors("bandit_toy.py"):
        main()
