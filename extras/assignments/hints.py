"""A hint for each known mistake: its name in tests/mutations.py -> what a student reads."""

HINTS = {
    # A1
    "KL reversed": "Your objective has KL(ref || pi); eq. 2 has KL(pi || ref).",
    "no reference": "Your h is ln pi; eq. 1 has ln(pi / ref).",
    "a gradient through R_beta": "In the baselines R_beta is a weight: no gradient runs through "
    "it. Yours has one.",
    "preferences reversed": "Your margin is that of the arm that lost.",
    "l_CoPG minimised": "You minimise l of eq. 7-9, which is to be maximised. The square has the "
    "other sign.",
    "beta / 2 for beta": "Your square has beta / 2. The beta / 2 of eq. 7 is in the weights that "
    "are differentiated through; completing the square gives beta.",
    "2 beta for beta": "Your square has 2 beta in front of dh; completing the square gives beta.",
    "not divided by 2 beta": "The minimum is the right one, the scale is not: divide the square by "
    "2 beta.",
    "baseline E_pi[R] for E_pi[R_beta]": "This baseline is E_pi[R_beta], the regularised value; "
    "yours is E_pi[R], and it is biased.",
    "one policy collects both": "y comes from mu1 and y' from mu2. Yours are both from mu1.",
    "bandit: ranked labels are sampled": "With labels = ranked nothing is drawn: the better arm "
    "always wins.",
    "bandit: ranked labels reversed": "wins is True where the first arm is the better one. With "
    "ranked labels yours has it the other way round.",
    # A2
    "positions count the padding": "Positions start with 0 at the first real token. Yours count "
    "the padding on the left, too.",
    "temperature not applied in sampling": "You sample at temperature 1, whatever is asked for.",
    "EOS left out of the mask": "The EOS was sampled too: it belongs to the mask, and is trained.",
    "sampled in train mode": "In train mode, which checkpointing needs, transformers drops the "
    "cache: your samples do not see the prompt. Change to eval mode, and back.",
    "position stands still": "Each new token has the next position. In your sampler all have the "
    "first one's.",
    "positions of the first unique prompts": "You score completions with the positions of other "
    "prompts: select positions as you select prompts.",
    "cached prompts in the wrong order": "Rows are prompt-major: the G rows of a prompt are "
    "adjacent. The first logits of yours come in another order.",
    "cache keeps the wrong rows": "When rows end, the cache has to keep the rows that go on. Yours "
    "keeps the first ones.",
    "a row moves without its positions": "When rows end and others take their places, masks and "
    "positions have to move along.",
    "temperature not applied in scoring": "You score at temperature 1. What is sampled at a "
    "temperature has to be scored at it.",
    "scored one position late": "The state at a position predicts the next token. Yours is asked "
    "for the token that it has just read.",
    "scored one position late after a shared prompt": "The first token of a completion is "
    "predicted by the last state of the prompt.",
    "shared prompts mixed up": "The last state of a prompt goes to the rows of that prompt. Yours "
    "go round in turn.",
    "a shared prompt's padding read": "Your model reads the padding of the prompts: it needs an "
    "attention mask without it.",
    "padding is the token 0": "Padding has the token 0, which a prompt may have, too. "
    "Yours takes two prompts for one that differ by it: only the mask tells them apart.",
    "log-probs in the dtype of the logits": "Under autocast the logits are bf16, and "
    "eight bits are too few for a log-softmax: it needs float32.",
    "no gradient through a shared prompt": "The prompt is part of what the policy computes: your "
    "gradient stops at the completion.",
    "a shared prompt where checkpointing drops the cache": "In train mode with gradient "
    "checkpointing, transformers drops the cache: without it your completions do not see their "
    "prompt.",
    "completions of a prompt torn apart": "With `together`, a block of adjacent rows has to stay "
    "in one micro-batch.",
    # A3
    "validity by a float std": "A std is not exactly 0 for equal floats, and is almost 0 for some "
    "that differ: judge the raw rewards.",
    "std in place of 1": "Your two values of f_norm are interchanged: \"1\" does not divide by the "
    "std.",
    "population std": "Your std divides by G; here it is the unbiased one, over G - 1.",
    "batch mean for group mean": "You subtract the mean of the batch; eq. 6 has that of the group.",
    "leave-one-out mean": "You subtract the mean of the others; the mean of eq. 6 includes the "
    "sample itself.",
    "alpha inverted": "Your alpha is upside down: eq. 7 is at least 1.",
    "M counted by non-zero reward": "You count the groups without any reward as dead; eq. 7 counts "
    "groups whose rewards are all equal, also all right.",
    "alpha by non-zero rewards (verl)": "Your alpha counts non-zero rewards; eq. 7 counts groups "
    "whose rewards are all equal.",
    "sign flipped": "Your loss falls when bad completions get likelier: eq. 5 has a minus.",
    "alpha dropped from the loss": "Your loss ignores alpha: eq. 8 multiplies by it.",
    "mean of each sequence": "You take the mean of each completion first; here the sums run over "
    "all tokens of the batch, divided once.",
    "normalised per micro-batch": "You divide by the tokens of these rows even if total_tokens is "
    "given: the losses of micro-batches then do not add up.",
    "mask ignored": "Your loss counts padding: multiply by the mask.",
    "valid groups of earlier rounds lost": "Filled up with dead groups, the last round comes "
    "first; yours starts with the first round.",
    "threshold the wrong way": "You stop while too few groups are valid, and go on when there are "
    "enough.",
    "threshold ignored": "You sample once, whatever --beta-th says.",
    "GPG: rewards of the first round only": "Several rounds make one batch: your rewards are those "
    "of one round, your rollout of all.",
    "alpha ignored in training": "alpha stays 1 in your training without --no-alpha, too.",
    "dead groups' tokens not counted": "Dead groups of the batch count in the denominator of eq. "
    "5; alpha makes up for them.",
    "GPG: total_tokens of all rounds": "The denominator counts the groups of the batch, not of all "
    "rounds.",
    "gradients not cleared": "You never clear the gradients: each step adds those of all earlier "
    "ones.",
    "advantages of other rows": "The advantages have to be those of the rows of the micro-batch, "
    "which are not the first ones.",
    "scored at temperature 1": "What is sampled at --temperature has to be scored at it.",
    "GPG: f_norm not handed on": "--f-norm does nothing in your training.",
    "GPG: the rate is set after the step": "You set the learning rate after the step: every step "
    "has the one before's.",
    "GPG: the gradient is not clipped": "--clip-grad does nothing in your training.",
    # A4
    "GRPO: population std": "Your std divides by G; here it is the unbiased one, over G - 1.",
    "GRPO: std for none": "scale=\"none\" (Dr. GRPO) does not divide by the std; yours does.",
    "GRPO: rounding in dead groups kept": "In floating point, a reward less the mean of equal "
    "rewards is not always 0, and over a std near 0 it grows: set dead groups to 0.",
    "GRPO: KL reversed": "Your log-ratio is upside down: eq. 4 has pi_ref / pi.",
    "GRPO: k1 for k3": "Yours is k1, -log(pi_ref / pi), which can be negative; eq. 4 is k3.",
    "GRPO: max for min": "Eq. 3 takes the minimum of the two products, yours the maximum.",
    "GRPO: clips swapped": "clip_low belongs to the lower bound, clip_high to the upper one.",
    "GRPO: no minimum, only the clip": "You always use the clipped ratio: a token that has become "
    "worse is then never pulled back. Eq. 3 has a minimum.",
    "GRPO: clip inverted for negative advantages": "Take the minimum of the products with A, not "
    "of the ratios: for A < 0 it is the other one.",
    "GRPO: sign flipped": "Eq. 3 is to be maximised; the loss is minus it.",
    "GRPO: ratio inverted": "Your ratio is pi_old / pi.",
    "GRPO: KL as a reward": "The KL is a cost: it is subtracted from J.",
    "GRPO: KL without beta": "The KL is weighted with kl_beta; yours has weight 1.",
    "GRPO: no 1 / |o_i|": "\"sequence\" divides each row by its own length first.",
    "GRPO: 1 / |o_i| everywhere": "Only \"sequence\" divides each row by its length.",
    "GRPO: normalised per micro-batch": "You compute the divisor from these rows even if `total` "
    "is given: the losses of micro-batches then do not add up.",
    "GRPO: mask ignored": "Your loss counts padding: multiply by the mask.",
    "GRPO: one pass only": "You make one pass; mu of them are asked for, each in a new order.",
    "GRPO: dynamic sampling never": "With --dynamic-sampling, you have to sample again until B "
    "groups are valid, at most --max-rounds times.",
    "GRPO: reference scored at temperature 1": "The reference has to score at --temperature, like "
    "the policy.",
    "GRPO: dead rows without their KL": "A dead row has no advantage, but its KL has a gradient: "
    "with a KL all rows go through the model.",
    "GRPO: rows of the first groups": "The rows of the batch are those of the chosen groups, not "
    "the first ones.",
    "GRPO: advantages of the first groups": "The advantages are those of the chosen groups, not of "
    "the first ones.",
    "GRPO: constant is the longest completion": "Dr. GRPO's constant is --max-new-tokens, not a "
    "length that was sampled.",
    "GRPO: old policy is the current one": "Your ratio is always 1: the old log-probs are those "
    "that the sampler kept.",
    "GRPO: scored at temperature 1": "What is sampled at --temperature has to be scored at it.",
    "GRPO: reference log-probs of other rows": "The log-probs of the reference have to be those of "
    "the rows of the micro-batch.",
    "GRPO: advantages of other rows": "The advantages have to be those of the rows of the "
    "micro-batch, which are not the first ones.",
    "GRPO: dead rows out of the total": "Rows without a gradient skip the model, but they count in "
    "the total.",
    "GRPO: gradients not cleared": "You never clear the gradients: each update adds those of all "
    "earlier ones.",
    "GRPO: total of the whole batch": "The total is that of the minibatch of this update.",
    "Dr. GRPO: the constant is what was sampled": "Dr. GRPO's constant is --max-new-tokens, not "
    "the number of columns that were sampled.",
    # A5
    "CoPG maximised": "The square is to be minimised; yours has the other sign.",
    "CoPG: beta / 2": "Your square has beta / 2. The beta / 2 of eq. 7 is in the weights that are "
    "differentiated through; completing the square gives beta.",
    "CoPG: 2 beta": "Your square has 2 beta in front of dh; completing the square gives beta.",
    "CoPG: not divided by 2 beta": "The minimum is the right one, the scale is not: divide the "
    "square by 2 beta.",
    "CoPG: stop-gradient on R_{beta/2}": "The weights of eq. 7 are differentiated through. With a "
    "stop-gradient on them you find the optimum for beta / 2.",
    "CoPG: sum over pairs not divided by K - 1": "The sum over the pairs is divided by K - 1.",
    "CoPG: pairs with the first only": "You compare each completion with the first only: all pairs "
    "i < j are meant.",
    "IPO: 1 for 1 / 2": "beta times the margin is to be 1/2 in IPO.",
    "DPO: sign": "Your margin is that of the rejected completion.",
    "IPO and DPO: worst for best": "You take the worst completion for the best.",
    "Bradley-Terry reversed": "Your model prefers the rejected completion.",
    "repeated facts count twice": "A fact is worth something once, however often it is stated.",
}  # fmt: skip

EXEMPT = {  # wrong versions that lose no points, and why
    "gradients of a shared prompt in any order": "equal but for rounding",
} | dict.fromkeys(
    (
        "pictures: one-dimensional positions", "pictures of the wrong group",
        "pictures left out of the same prompt", "pictures of the first unique prompts",
        "a sampled image token takes a picture",
    ),
    "A2 has no pictures",
)  # fmt: skip
