"""Wrong versions, each made for real: `python tests/mutations.py` says which tests notice.

A test that stays green on a wrong version proves nothing. Every line below is one small mistake,
most of them found in published code; the tests named with it have to fail. All of them take half an
hour on two cores; `python tests/mutations.py grpo.py` makes those whose entry has this word.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
JOBS = int(os.environ.get("JOBS", "2"))  # at a time, with one thread each

MUTATIONS = [  # what is wrong, file, right text, wrong text, tests
    ("sign flipped", "gpg.py", "(-logprobs * adv", "(logprobs * adv", "gpg"),
    ("alpha dropped from the loss", "gpg.py", "return alpha * (", "return (", "gpg"),
    ("alpha ignored in training", "gpg.py", "if args.no_alpha and", "if", "gpg"),
    ("alpha inverted", "gpg.py", "return B / valid if", "return valid / B if", "gpg"),
    (
        "M counted by non-zero reward", "gpg.py",
        "int(is_valid(rewards).sum())", "int((rewards != 0).any(1).sum())", "gpg",
    ),
    (
        "alpha by non-zero rewards (verl)", "gpg.py",
        "    return B / valid if valid else 0.0",
        "    return rewards.numel() / max(1, int((rewards != 0).sum())) if valid else 0.0", "gpg",
    ),
    (
        "validity by a float std", "gpg.py",
        "return rewards.amax(1) != rewards.amin(1)", "return rewards.std(1) > 1e-5", "gpg",
    ),
    (
        "std in place of 1", "gpg.py",
        'if f_norm == "std" else centred', 'if f_norm != "std" else centred', "gpg",
    ),
    ("population std", "gpg.py", "std(1, keepdim=True)", "std(1, False, keepdim=True)", "gpg"),
    ("batch mean for group mean", "gpg.py", "rewards.mean(1, keepdim=True)", "rewards.mean()", "gpg"),
    (
        "leave-one-out mean", "gpg.py",
        "centred = rewards - rewards.mean(1, keepdim=True)",
        "centred = (rewards - rewards.mean(1, keepdim=True)) * len(rewards[0]) / (len(rewards[0]) - 1)",
        "gpg",
    ),
    (
        "mean of each sequence", "gpg.py",
        "(-logprobs * advantages[:, None] * mask).sum() / total_tokens",
        "((-logprobs * advantages[:, None] * mask).sum(1) / mask.sum(1)).mean()", "gpg",
    ),
    (
        "normalised per micro-batch", "gpg.py",
        "total_tokens = mask.sum() if total_tokens is None else total_tokens",
        "total_tokens = mask.sum()", "gpg",
    ),
    (
        "dead groups' tokens not counted", "gpg.py",
        "group_tokens[batch].sum()", "group_tokens[valid].sum()", "gpg",
    ),
    ("mask ignored", "gpg.py", "advantages[:, None] * mask)", "advantages[:, None])", "gpg"),
    ("threshold the wrong way", "gpg.py", ">= args.beta_th", "< args.beta_th", "gpg"),
    ("threshold ignored", "gpg.py", "if valid.sum() / B >= args.beta_th:", "if True:", "gpg"),
    ("valid groups of earlier rounds lost", "gpg.py", "dead.flip(0)", "dead", "gpg"),
    (
        "gradients not cleared", "gpg.py",
        "            optimizer.zero_grad()\n", "", "gpg",
    ),
    (
        "advantages of other rows", "gpg.py",
        "advantages[rows], mb.comp", "advantages[: len(rows)], mb.comp", "gpg",
    ),
    ("scored at temperature 1", "gpg.py", "(model, mb, args.temperature)", "(model, mb)", "gpg"),
    ("GRPO: max for min", "grpo.py", "J = torch.min(", "J = torch.max(", "grpo"),
    (
        "GRPO: clips swapped", "grpo.py",
        "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(1 - clip_high, 1 + clip_low)", "grpo",
    ),
    (
        "GRPO: no minimum, only the clip", "grpo.py",
        "torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)",
        "ratio.clamp(1 - clip_low, 1 + clip_high) * A", "grpo",
    ),
    (
        "GRPO: clip inverted for negative advantages", "grpo.py",
        "J = torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)",
        "J = torch.min(ratio, ratio.clamp(1 - clip_low, 1 + clip_high)) * A", "grpo",
    ),
    ("GRPO: sign flipped", "grpo.py", "return -(J * mask)", "return (J * mask)", "grpo"),
    ("GRPO: ratio inverted", "grpo.py", "ratio = (logprobs - old_logprobs).exp()  #", "ratio = (old_logprobs - logprobs).exp()  #", "grpo"),
    ("GRPO: KL reversed", "grpo.py", "log_ratio = ref_logprobs - logprobs", "log_ratio = logprobs - ref_logprobs", "grpo"),
    ("GRPO: k1 for k3", "grpo.py", "return log_ratio.expm1() - log_ratio", "return -log_ratio", "grpo"),
    ("GRPO: KL as a reward", "grpo.py", "J = J - kl_beta *", "J = J + kl_beta *", "grpo"),
    ("GRPO: KL without beta", "grpo.py", "J = J - kl_beta * kl_k3(", "J = J - kl_k3(", "grpo"),
    ("GRPO: no 1 / |o_i|", "grpo.py", "J = J / mask.sum(1, keepdim=True)", "pass", "grpo"),
    (
        "GRPO: 1 / |o_i| everywhere", "grpo.py",
        'if aggregate == "sequence":\n', "if True:\n", "grpo",
    ),
    (
        "GRPO: normalised per micro-batch", "grpo.py",
        "total = batch_total(mask, aggregate, mask.shape[1]) if total is None else total",
        "total = batch_total(mask, aggregate, mask.shape[1])", "grpo",
    ),
    (
        "GRPO: constant is the longest completion", "grpo.py",
        "total = batch_total(mask, args.aggregate, args.max_new_tokens)",
        "total = batch_total(mask, args.aggregate, mask.shape[1] - 1)", "grpo",
    ),
    ("GRPO: mask ignored", "grpo.py", "return -(J * mask)", "return -(J)", "grpo"),
    ("GRPO: population std", "grpo.py", "rewards.std(1, keepdim=True)", "rewards.std(1, False, keepdim=True)", "grpo"),
    ("GRPO: std for none", "grpo.py", 'if scale == "std" else', "if True else", "grpo"),
    (
        "GRPO: rounding in dead groups kept", "grpo.py",
        "    centred = centred * is_valid(rewards)[:, None]", "    # ", "grpo",
    ),
    (
        "GRPO: old policy is the current one", "grpo.py",
        "logprobs, mb.logprobs, A, mb", "logprobs, logprobs.detach(), A, mb", "grpo",
    ),
    (
        "GRPO: reference from the checkpoint", "grpo.py",
        "ref_model = common.load_model(args.model,", "ref_model = common.load_model(run.weights or args.model,", "grpo",
    ),
    (
        "GRPO: the reference is the policy", "grpo.py",
        "ref_model = common.load_model(args.model, args.device, task)[0].requires_grad_(False)",
        "ref_model = model", "grpo",
    ),
    (
        "GRPO: reference scored at temperature 1", "grpo.py",
        "ref_model, batch, args.micro_batch_tokens, args.temperature",
        "ref_model, batch, args.micro_batch_tokens", "grpo",
    ),
    ("GRPO: scored at temperature 1", "grpo.py", "(model, mb, args.temperature)", "(model, mb)", "grpo"),
    (
        "GRPO: reference log-probs of other rows", "grpo.py",
        "ref_logprobs[rows, :", "ref_logprobs[: len(rows), :", "grpo",
    ),
    (
        "GRPO: advantages of other rows", "grpo.py",
        "advantages[rows]", "advantages[: len(rows)]", "grpo",
    ),
    (
        "GRPO: dead rows out of the total", "grpo.py",
        "mask = batch.completion_mask[minibatch]", "mask = batch.completion_mask[minibatch][live[minibatch]]", "grpo",
    ),
    (
        "GRPO: dead rows without their KL", "grpo.py",
        "live = (advantages != 0) | (args.kl_beta > 0)", "live = advantages != 0", "grpo",
    ),
    (
        "GRPO: dynamic sampling keeps dead groups", "grpo.py",
        "return alive if dynamic_sampling and len(alive) else", "return", "grpo",
    ),
    ("GRPO: dynamic sampling never", "grpo.py", "args.max_rounds if args.dynamic_sampling else 1", "1", "grpo"),
    ("GRPO: one pass only", "grpo.py", "for _ in range(mu) for", "for _ in range(1) for", "grpo"),
    ("GRPO: gradients not cleared", "grpo.py", "            optimizer.zero_grad()\n", "", "grpo"),
    ("GRPO: DAPO's upper clip lost", "grpo.py", 'VARIANTS["dapo"]["clip_high"] = 0.28', "", "grpo"),
    (
        "frozen log-probs in the wrong rows", "common.py",
        "logprobs[rows, : values.shape[1]] =", "logprobs[: len(rows), : values.shape[1]] =", "grpo",
    ),
    (
        "temperature not applied in scoring", "common.py",
        "torch.float32)) / temperature", "torch.float32))", "sampling",
    ),
    (
        "temperature not applied in sampling", "common.py",
        "logits.float() / (temperature or 1.0)", "logits.float()", "sampling",
    ),
    (
        "EOS left out of the mask", "common.py",
        "= tokens, token_logprobs, True",
        "= tokens, token_logprobs, ~torch.isin(tokens, stop_ids)", "sampling",
    ),
    (
        "only the tokenizer's EOS stops", "common.py",
        "ids = [*ids, tokenizer.eos_token_id, ", "ids = [tokenizer.eos_token_id, ", "sampling",
    ),
    (
        "scored one position late", "common.py",
        "T + 1, pictures=rollout.pictures)[:, :-1]", "T, pictures=rollout.pictures)", "sampling",
    ),
    (
        "scored one position late after a shared prompt", "common.py",
        "torch.cat([first.index_select(0, prompt_of), rest], 1)", "torch.cat([rest, rest[:, -1:]], 1)", "sampling",
    ),
    (
        "shared prompts mixed up", "common.py",
        "[first.index_select(0, prompt_of), rest]", "[first.repeat(len(mask) // len(first), 1, 1), rest]", "sampling",
    ),
    (
        "a shared prompt's padding read", "common.py",
        "rollout.prompt_ids[row_of], rollout.prompt_mask[row_of]", "rollout.prompt_ids[row_of], rollout.prompt_mask[row_of] | True", "sampling",
    ),
    (
        "gradients of a shared prompt in any order", "common.py",
        "cache.reorder_cache(prompt_of)", "cache.batch_select_indices(prompt_of)", "sampling",
    ),
    (
        "no gradient through a shared prompt", "common.py",
        "    rest = states(",
        "    for x in cache.layers:\n        x.keys, x.values = x.keys.detach(), x.values.detach()\n"
        "    rest = states(", "sampling",
    ),
    (
        "a shared prompt where checkpointing drops the cache", "common.py",
        "T == 1 or model.training:", "T == 1:", "sampling",
    ),
    ("sampled in train mode", "common.py", "    model.eval()  # in train", "    # in train", "sampling"),
    (
        "positions count the padding", "common.py",
        "return (mask.long().cumsum(1) - 1).clamp(min=0)",
        "return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)", "sampling",
    ),
    ("position stands still", "common.py", "seen[:, : P + t + 1], position + t)", "seen[:, : P + t + 1], position)", "sampling"),
    (
        "cached prompts in the wrong order", "common.py",
        "logits = logits.repeat_interleave(G, 0)",
        "logits = logits.repeat(G, 1)", "sampling",
    ),
    (
        "cache keeps the wrong rows", "common.py",
        "cache.batch_select_indices(keep)",
        "cache.batch_select_indices(torch.arange(len(keep)))", "sampling",
    ),
    ("a row moves without its cache", "common.py", "x[moved] = x[keep[moved]]", "pass", "sampling"),
    (
        "a row moves without its positions", "common.py",
        "seen, position = seen[keep], position[keep]",
        "seen, position = seen[:n], position[:n]", "sampling",
    ),
    (
        "a token written over the last one", "common.py",
        "self.keys[:, :, L:], self.values[:, :, L:] = keys, values",
        "self.keys[:, :, L - 1 : -1], self.values[:, :, L - 1 : -1] = keys, values", "sampling",
    ),
    (
        "capped logits scored uncapped", "common.py",
        "torch.equal(logits, model(**inputs).logits)",
        "torch.allclose(logits, model(**inputs).logits, 1e-2, 1e-2)", "sampling",
    ),
    ("dropout left on", "common.py", 'if "drop" in key', 'if "no such key" in key', "sampling"),
    (
        "a second BOS under a template", "common.py",
        "add_special_tokens=not tokenizer.chat_template", "add_special_tokens=True", "sampling",
    ),
    (
        "rewards in the wrong order", "tasks/episodes.py",
        "index = problems[row // G]", "index = problems[row % len(problems)]", "tasks",
    ),
    (
        "test problems in training", "tasks/addition.py",
        'if is_held_out == (self.split == "test"):', "if True:", "tasks",
    ),
    ("first box, not the last", "tasks/verifier.py", 'text.rfind("\\\\boxed{")', 'text.find("\\\\boxed{")', "tasks"),
    ("numbers compared as floats", "tasks/verifier.py", "return target == (", "return float(target) == float(", "tasks"),
    ("l_CoPG minimised", "bandit_toy.py", "return ((p.r - p.r_) - p.b", "return -((p.r - p.r_) - p.b", "bandit"),
    ("beta / 2 for beta", "bandit_toy.py", "- p.beta * (p.h - p.h_)) **", "- p.beta / 2 * (p.h - p.h_)) **", "bandit"),
    ("2 beta for beta", "bandit_toy.py", "- p.beta * (p.h - p.h_)) **", "- 2 * p.beta * (p.h - p.h_)) **", "bandit"),
    ("not divided by 2 beta", "bandit_toy.py", "** 2 / (2 * p.beta)", "** 2", "bandit"),
    ("no reference", "bandit_toy.py", "log_ratio = log_pi - tensor(ref).log()", "log_ratio = log_pi", "bandit"),
    (
        "a gradient through R_beta", "bandit_toy.py",
        "self.rewards - beta * log_ratio.detach()", "self.rewards - beta * log_ratio", "bandit",
    ),
    (
        "baseline E_pi[R] for E_pi[R_beta]", "bandit_toy.py",
        "-((p.rb - p.value_kl()) * p.logp +", "-((p.rb - p.value()) * p.logp +", "bandit",
    ),
    ("preferences reversed", "bandit_toy.py", "self.h - self.h_, self.h_ - self.h)", "self.h_ - self.h, self.h - self.h_)", "bandit"),
    ("KL reversed", "bandit_toy.py", "torch.xlogy(policy, policy / tensor(ref))", "torch.xlogy(tensor(ref), tensor(ref) / policy)", "bandit"),
    ("one policy collects both", "bandit_toy.py", "collect(MU2, pairs, rng, env)", "collect(MU1, pairs, rng, env)", "bandit"),
    (
        "CoPG maximised", "copg.py",
        "(R_beta[:, i] - R_beta[:, j]) ** 2", "-(R_beta[:, i] - R_beta[:, j]) ** 2", "copg",
    ),
    ("CoPG: beta / 2", "copg.py", "R_beta = rewards - beta * logratios", "R_beta = rewards - beta / 2 * logratios", "copg"),
    ("CoPG: 2 beta", "copg.py", "R_beta = rewards - beta * logratios", "R_beta = rewards - 2 * beta * logratios", "copg"),
    ("CoPG: not divided by 2 beta", "copg.py", "R_beta[:, j]) ** 2 / (2 * beta)", "R_beta[:, j]) ** 2", "copg"),
    (
        "CoPG: stop-gradient on R_{beta/2}", "copg.py",
        "    pairs = (R_beta[:, i] - R_beta[:, j]) ** 2 / (2 * beta)",
        "    half = (rewards - beta / 2 * logratios).detach()\n"
        "    pairs = -(half[:, i] - half[:, j]) * (logratios[:, i] - logratios[:, j])", "copg",
    ),
    ("CoPG: sum over pairs not divided by K - 1", "copg.py", "pairs.sum(1).mean() / (K - 1)", "pairs.sum(1).mean()", "copg"),
    ("CoPG: pairs with the first only", "copg.py", "torch.triu_indices(K, K, 1)", "torch.triu_indices(K, K, 1)[:, : K - 1]", "copg"),
    ("CoPG: log-ratios per token", "copg.py", "logprobs.sum(1).view(-1, K) - ref", "(logprobs.sum(1) / mb.completion_mask.sum(1)).view(-1, K) - ref", "copg"),
    ("CoPG: no reference", "copg.py", "view(-1, K) - ref_logprobs[i]", "view(-1, K)", "copg"),
    ("CoPG: rewards of other prompts", "copg.py", "rows[::K] // K ", "torch.arange(len(rows) // K) ", "copg"),
    ("CoPG: micro-batches as means", "copg.py", "args.beta) * len(i) / P", "args.beta)", "copg"),
    ("CoPG: gradients not cleared", "copg.py", "        optimizer.zero_grad()\n", "", "copg"),
    ("CoPG: the reference learns too", "copg.py", "ref_model = common.load_model(args.model, args.device, task)[0].requires_grad_(False)", "ref_model = model", "copg"),
    ("IPO: 1 for 1 / 2", "copg.py", "((0.5 - beta", "((1.0 - beta", "copg"),
    ("DPO: sign", "copg.py", "logsigmoid(beta * (logratio_chosen - logratio_rejected))", "logsigmoid(beta * (logratio_rejected - logratio_chosen))", "copg"),
    ("IPO and DPO: worst for best", "copg.py", "best, worst = rewards.argmax(1, keepdim=True), rewards.argmin(1, keepdim=True)", "best, worst = rewards.argmin(1, keepdim=True), rewards.argmax(1, keepdim=True)", "copg"),
    ("Bradley-Terry reversed", "copg.py", "logsigmoid(score_chosen - score_rejected)", "logsigmoid(score_rejected - score_chosen)", "copg"),
    ("preferences against the utility", "tasks/posts.py", "swapped = rng.random() > ", "swapped = rng.random() < ", "tasks"),
    ("scores read at the padding", "copg.py", "ids = ids.where(mask, model.config.pad_token_id)", "ids = ids", "copg"),
    ("a cut completion gets an EOS", "copg.py", ".masked_fill(rollout.truncated, -1)", "", "copg"),
    ("the tokenizer's EOS ends every answer", "copg.py", "return eos[-1]", "return eos[0]", "copg"),
    ("the ends of --data are lost", "copg.py", "rest.ends = None if self.ends is None else self.ends[index]", "rest.ends = None", "copg"),
    ("ranked: of equal rewards only the first", "copg.py", "(likeliest == rewards[i].amax(1)).sum()", "(logratios.argmax(1) == rewards[i].argmax(1)).sum()", "copg"),
    ("TRL: the ends of the file ignored", "extras/on_trl.py", "eos if end is None else end for end in", "eos for _ in", "on_trl"),
    ("held-out prompts in training", "copg.py", "if not held] or list(", "] or list(", "copg"),
    ("compare: a stopped run is finished", "extras/compare.py", 'raise common.UserError(f"{out.name}: it was stopped; the same command continues it")', "pass", "extras"),
    ("a test without splits is the training's", "tasks/episodes.py", "2**31 + seed", "seed", "tasks"),
    ("any trouble with memory is a lack of it", "common.py", "out of memory|(allocate|enough) memory|memoryerror", "memory", "runs"),
    ("the last figures pass for the last step's", "common.py", "{describe(state['after'])}{stale}", "{describe(state['after'])}", "runs"),
    ("the same order in every epoch", "copg.py", "seed + 1000 * epoch", "seed", "copg"),
    ("KL with the wrong sign", "copg.py", "(rollout.logprobs - ref).sum(1)", "(ref - rollout.logprobs).sum(1)", "copg"),
    ("preferences worth 1 and -1", "copg.py", "[0.25, -0.25]", "[1.0, -1.0]", "copg"),
    ("repeated facts count twice", "tasks/posts.py", "for clause in set(stated) if", "for clause in stated if", "tasks"),
    (
        "completions of a prompt torn apart", "common.py",
        "batches[-1] += range(i * together, (i + 1) * together)",
        "batches[-1] += range(i, len(lengths) * together, len(lengths))", "copg",
    ),
    ("random states not restored", "common.py", '                torch.set_rng_state(saved["rng"])\n', "", "runs"),
    ("optimizer not restored", "common.py", '                optimizer.load_state_dict(saved["optimizer"])\n', "", "runs"),
    ("checkpoint written in place", "common.py", 'new, old = self.dir / "checkpoint.new"', 'new, old = self.dir / "checkpoint"', "runs"),
    ("rows after the checkpoint kept", "common.py", "os.truncate(path, size)", "pass", "runs"),
    ("old checkpoint deleted before the new one is in place", "common.py", "self.checkpoint.rename(old)", "shutil.rmtree(self.checkpoint)", "runs"),
    ("checkpoint.old never renamed back", "common.py", "old.rename(self.checkpoint)", "pass", "runs"),
    ("no lock", "common.py", "fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "runs"),
    ("starts in a directory that is not empty", "common.py", "if not args.resume and any(self.dir.iterdir()):", "if False:", "runs"),
    ("a contradicting flag ignored", "common.py", 'if flag not in ("resume", "steps", "device") and value', "if False and value", "runs"),
    ("problems repeat after a resume", "common.py", 'saved["state"][name] for name in self.state}', 'saved["state"][name] for name in self.state} | {"problem": self.state["problem"]}', "runs"),
    ("every seed trains on the same problems", "run.py", "first_problem(args.seed)", "first_problem(0)", "gpg"),
    ("standard error over nothing", "common.py", "values.std() / math.sqrt(len(values))", "values.std()", "train"),
    ("standard error over samples", "common.py", 'mean_and_error("accuracy", sampled.mean(1))', 'mean_and_error("accuracy", sampled.flatten())', "train"),
    ("accuracy is the mean reward", "common.py", "get_rewards(task, problems, rollout.texts)[1])", "get_rewards(task, problems, rollout.texts)[0])", "train"),
    ("pass@k is the accuracy", "common.py", "sampled.amax(1).mean()", "sampled.mean(1).mean()", "train"),
    ("greedy is sampled", "common.py", "solve(1, 0.0)", "solve(1, args.temperature)", "train"),
    ("evaluated at temperature 1", "common.py", "k, args.max_new_tokens, temperature)", "k, args.max_new_tokens)", "train"),
    ("evaluation moves the random numbers", "common.py", "    with torch.random.fork_rng(range(torch.cuda.device_count())):\n", "    with contextlib.nullcontext():\n", "train runs"),
    ("entropy with the wrong sign", "common.py", "-rollout.logprobs.sum().item() / tokens", "rollout.logprobs.sum().item() / tokens", "gpg"),
    ("reward_std over the batch", "common.py", "rewards.std(1).mean().item()", "rewards.std().item()", "gpg"),
    ("warm-up starts at the peak", "common.py", "return peak * step / warmup", "return peak", "train runs gpg"),
    ("cosine ends at half", "common.py", "0.5 * math.cos(math.pi * progress)", "0.5 * math.cos(math.pi * progress / 2)", "train runs gpg"),
    ("GPG: total_tokens of all rounds", "gpg.py", "group_tokens[batch].sum()", "group_tokens.sum()", "train gpg"),
    ("GPG: f_norm not handed on", "gpg.py", "group_advantages(rewards[valid], args.f_norm)", "group_advantages(rewards[valid])", "train gpg"),
    ("GPG: the rate is set after the step", "gpg.py", '            optimizer.param_groups[0]["lr"] = lr\n            optimizer.step()\n', '            optimizer.step()\n            optimizer.param_groups[0]["lr"] = lr\n', "train gpg"),
    ("GPG: no weight decay", "gpg.py", "weight_decay=args.weight_decay", "weight_decay=0.0", "train gpg"),
    ("GPG: the gradient is not clipped", "gpg.py", "model.parameters(), args.clip_grad, error", "model.parameters(), 1e9, error", "train gpg"),
    ("GPG: test task in training", "gpg.py", 'common.make_task(args.task), common.make_task(args.task, "test")', 'common.make_task(args.task, "test"), common.make_task(args.task, "test")', "train gpg"),
    ("GPG: rewards of the first round only", "gpg.py", "rewards = torch.cat([rewards, new_rewards])", "rewards = new_rewards", "train gpg"),
    ("GRPO: rows of the first groups", "grpo.py", "(groups[:, None] * G + torch.arange(G)).flatten()", "torch.arange(len(groups) * G)", "train grpo"),
    ("GRPO: total of the whole batch", "grpo.py", "mask = batch.completion_mask[minibatch]  #", "mask = batch.completion_mask  #", "train grpo"),
    ("Dr. GRPO: the constant is what was sampled", "grpo.py", "batch_total(mask, args.aggregate, args.max_new_tokens)", "batch_total(mask, args.aggregate, mask.shape[1])", "grpo"),
    ("reward model: a second BOS under a template", "copg.py", "rows = tokenizer(texts, add_special_tokens=False).input_ids", "rows = tokenizer(texts).input_ids", "copg"),
    ("regret.csv: seed and epoch swapped", "bandit_toy.py", "for (epoch, seed), value in", "for (seed, epoch), value in", "bandit"),
    ("answers in words cut to a number", "tasks/jsonl.py", 'if "####" in answer else', "or", "tasks"),
    ("records are held out, not prompts", "tasks/jsonl.py", "numbers.setdefault(key, len(numbers)) % 10 == 0 for key in keys", "i % 10 == 0 for i, _ in enumerate(keys)", "tasks"),
    ("CoPG: records are held out, not prompts", "copg.py", "held_out = is_held_out(self.prompts)", "held_out = [i % 10 == 0 for i in range(len(self.prompts))]", "copg"),
    ("CoPG: a longer resumed run warms up again", "copg.py", 'warmup = run.state["warmup"]', "warmup = math.ceil(steps / 10) if args.warmup is None else args.warmup", "copg"),
    ("padding is the token 0", "common.py", "rollout.prompt_ids.masked_fill(~rollout.prompt_mask, -1)", "rollout.prompt_ids", "sampling"),
    ("log-probs in the dtype of the logits", "common.py", "torch.promote_types(logits.dtype, torch.float32)", "logits.dtype", "sampling"),
    ("the split is another in every process", "tasks/addition.py", 'zlib.crc32(f"{a}+{b}".encode()) % 10', 'hash(f"{a}+{b}") % 10', "tasks"),
    ("GRPO: advantages of the first groups", "grpo.py", "group_advantages(rewards[groups], args.scale)", "group_advantages(rewards[: len(groups)], args.scale)", "train grpo"),
    ("CoPG: rewards of the first records", "copg.py", "data.rewards[index], data.ref_logprobs[index]", "data.rewards[: len(index)], data.ref_logprobs[index]", "train copg"),
    ("CoPG: reference of the first records", "copg.py", "data.rewards[index], data.ref_logprobs[index]", "data.rewards[index], data.ref_logprobs[: len(index)]", "train copg"),
    ("CoPG: chosen and rejected swapped", "copg.py", '[record["chosen"], record.get("rejected")]', '[record.get("rejected"), record["chosen"]]', "train copg"),
    ("CoPG: training task in the evaluation", "copg.py", 'common.make_task(args.task, "test") if', "common.make_task(args.task) if", "train copg"),
    ("CoPG: KL per token", "copg.py", "(rollout.logprobs - ref).sum(1)", "(rollout.logprobs - ref).mean(1)", "train copg"),
    ("CoPG: held-out rewards kept", "copg.py", "        rest.rewards = None if self.rewards is None else self.rewards[index]\n", "        rest.rewards = None if self.rewards is None else self.rewards[: len(index)]\n", "train copg"),
    ("reward model: a new head is accepted", "copg.py", "if wrong and not new_head:", "if False:", "train copg"),
    ("a prompt that changes is accepted", "tasks/episodes.py", "if not same_prompt(prompt, prompts.setdefault(index, prompt)):", "if False:", "tasks"),
    ("an endless episode is accepted", "tasks/episodes.py", "if as_number(terminated) != 1:", "if False:", "tasks"),
    ("infinite rewards are accepted", "tasks/episodes.py", "if not math.isfinite(value):", "if math.isnan(value):", "tasks"),
    ("imitates the prompt too", "tasks/tiny.py", "[-100] * len(prompt_ids) + completion_ids", "prompt_ids + completion_ids", "tasks"),
    ("never imitates the EOS", "tasks/tiny.py", "[*tokenizer(completion).input_ids, tokenizer.eos_token_id]", "tokenizer(completion).input_ids", "tasks"),
    ("NaN weights are accepted", "common.py", "if not all(p.isfinite().all() for p in model.parameters()):", "if False:", "sampling"),
    ("a recurrent state is accepted", "common.py", 'if kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"}:', "if False:", "sampling"),
    ("alpha.py: alpha inverted", "extras/alpha.py", "if alpha else V / B", "if not alpha else V / B", "extras"),
    ("alpha.py: dead groups are those all wrong", "extras/alpha.py", "ends = pmf[:, [0, -1]].sum(1)", "ends = pmf[:, 0]", "extras"),
    ("alpha.py: no noise from the number of valid groups", "extras/alpha.py", "within + (second - first**2)", "within + 0 * (second - first**2)", "extras"),
    ("alpha.py: the cap ends a round early", "extras/alpha.py", "if round < cap - 1 else", "if round < cap - 2 else", "extras"),
    ("alpha.py: Adam moves in dead steps", "extras/alpha.py", "m = np.where(live, 0.9 * m + 0.1 * grad, m)", "m = 0.9 * m + 0.1 * grad", "extras"),
    ("alpha.py: Adam without bias correction", "extras/alpha.py", "np.sqrt(v / (1 - 0.999 ** np.maximum(t, 1)))", "np.sqrt(v)", "extras"),
    ("alpha.py: rates chosen on the reported seeds", "extras/alpha.py", "values[:, :half].mean(1)", "values[:, half:].mean(1)", "extras"),
    ("compare.py: rates chosen on a reported seed", "extras/shared.py", "SELECTION_SEED = 100", "SELECTION_SEED = 0", "extras"),
    ("compare.py: rates chosen on reported problems", "extras/compare.py", "*seed_flags(seed)", '"--seed", str(seed)', "extras"),
    ("compare.py: evaluations cost time", "extras/compare.py", "seconds = np.nancumsum(metrics[\"seconds\"])", "seconds = np.nancumsum(metrics[\"seconds\"]) + 1", "extras"),
    ("compare.py: unequal caps", "extras/compare.py", '"grpo.py --variant dapo --max-rounds 8"', '"grpo.py --variant dapo"', "extras"),
    ("climb stops at the edge", "extras/shared.py", "for i in (best - 1, best + 1) if", "for i in (best - 1, best + 1) if min(start) <= i <= max(start) and", "extras"),
    ("sweep.py: betas chosen on reported posts", "extras/sweep.py", "*seed_flags(seed)", '"--seed", str(seed)', "extras"),
    ("sweep.py: a divergence counts as its last value", "extras/sweep.py", "    if diverged:\n", "    if False:\n", "extras"),
    ("bandit: ranked labels are sampled", "bandit_toy.py", "wins = np.greater(r, r_)", "wins = wins", "bandit"),
    ("bandit: ranked labels reversed", "bandit_toy.py", "wins = np.greater(r, r_)", "wins = np.less(r, r_)", "bandit"),
    ("bandit: the limit forgets the labels", "bandit_toy.py", "limit(method, labels=args.labels)", "limit(method)", "bandit"),
    ("evaluation begins at problem 0", "tasks/episodes.py", "range(first, end, 64)", "range(0, end, 64)", "tasks train"),
    ("evaluation ends too early", "tasks/episodes.py", "min(first + count, get_size", "min(count, get_size", "tasks train"),
    ("the hidden utility of other posts", "copg.py", "range(PREFERENCES, PREFERENCES + args.pairs)", "range(args.pairs)", "copg"),
    ("--reward-model task is learned", "copg.py", 'if args.reward_model != "task":', "if True:", "copg"),
    ("all wrong counts as all right", "gpg.py", "all_right=(~valid & (rewards[:, 0] > 0))", "all_right=(~valid & (rewards[:, 0] >= 0))", "gpg"),
    ("GRPO: all wrong counts the valid", "grpo.py", "all_wrong=(~valid & (rewards[:, 0] <= 0))", "all_wrong=(rewards[:, 0] <= 0)", "gpg"),
    ("a run without its checkpoint starts again", "common.py", "if not self.resumed and lines > 2:", "if False:", "runs"),
    ("words: too many are free", "tasks/words.py", "abs(words - n) / n", "max(0, n - words) / n", "tasks"),
    ("words: nearly solved is solved", "tasks/words.py", '"solved": reward == 1', '"solved": reward > 0.8', "tasks"),
    ("words: test topics in training", "tasks/words.py", "if (i % 5 == 0) == is_test]", "if True]", "tasks"),
    ("course: a case without a result has passed", "extras/assignments/sandbox.py", 'failure = "no result" if', "failure = None if", "course"),
    ("course: any object is a result", "extras/assignments/sandbox.py", "        check(value)\n", "", "course"),
    ("course: patched asserts count", "extras/assignments/sandbox.py", "not self.before.items() <= snapshot().items()", "False", "course"),
    ("course: what a student has started goes on", "extras/assignments/sandbox.py", "os.killpg(child, signal.SIGKILL)", "pass", "course"),
    ("course: the cap at half is dropped", "extras/course.py", "        share = 0.5\n", "", "course"),
    ("course: the student's module runs", "extras/assignments/regions.py", "elif isinstance(node, ast.Assign) and is_literal(node.value):", "elif isinstance(node, ast.Assign):", "course"),
    ("course: decorators of the student run", "extras/assignments/regions.py", "    node.decorator_list = [\n", "    [\n", "course"),
    ("course: feedback with the expected value", "extras/assignments/sandbox.py", 'if theirs and not message.startswith(("assert", "AssertionError")):', "if True:", "course"),
    ("course: everybody has the same numbers", "extras/assignments/written.py", 'f"{assignment} {question} {student.strip().lower()}"', 'f"{assignment} {question}"', "course"),
    ("course: no results when the grader is stopped", "extras/course.py", "    write_json(out, results)\n    for test", "    for test", "course"),
    ("course: a handout with the hidden tests", "extras/course.py", "for test in q.public]", "for test in q.public + q.hidden]", "course"),
    ("course: all submissions are graded again", "extras/course.py", "                continue\n", "                pass\n", "course"),
    ("pictures: one-dimensional positions", "common.py", "    if not any(pictures):\n        return (mask", "    if True:\n        return (mask", "pictures"),
    ("pictures: text goes on after the tokens", "common.py", "    return position.amax(1, keepdim=True) + 1", "    return position.amax(1, keepdim=True) * 0 + position.shape[1]", "pictures"),
    ("pictures left out of the same prompt", "common.py", "if any(rollout.pictures):  # the same prompt", "if False:  # the same prompt", "pictures"),
    ("pictures of the wrong group", "common.py", "[picture for picture in pictures for _ in range(G)]", "[picture for _ in range(G) for picture in pictures]", "pictures"),
    ("pictures of the first rows", "common.py", "[self.pictures[i] for i in index.tolist()]", "self.pictures[: len(index)]", "pictures"),
    ("pictures of the rollouts in reverse", "common.py", "[picture for rollout in rollouts for picture", "[picture for rollout in rollouts[::-1] for picture", "pictures"),
    ("pictures of the first unique prompts", "common.py", "[rollout.pictures[i] for i in row_of.tolist()]", "rollout.pictures[:U]", "pictures"),
    ("positions of the first unique prompts", "common.py", "next_position(position)[prompt_of]", "next_position(position)[prompt_of.sort().values]", "pictures"),
    ("a sampled image token is no end", "common.py", ', getattr(model.config, "image_token_id", None)]\n', "]\n", "pictures"),
    ("a sampled image token takes a picture", "common.py", "sampled_image = completion_ids == model.config.image_token_id", "sampled_image = completion_ids == -1", "pictures"),
    ("the image processor is not saved", "common.py", 'if hasattr(self.tokenizer, "image_processor"):', "if False:", "pictures"),
    ("a prompt has one image token", "tasks/pictures.py", "[*row[:i], *[image_id] * n, *row[i + 1 :]]", "row", "pictures"),
    ("an image token in the text is accepted", "tasks/pictures.py", "if len(places) != (picture is not None):", "if len(places) < (picture is not None):", "pictures"),
    ("CoPG forgets the pictures", "copg.py", "cut, completions, pictures)", "cut, completions)", "pictures"),
    ("pictures beside the working directory", "tasks/jsonl.py", "(Path(path).parent / image).resolve()", "Path(image).resolve()", "pictures"),
    ("a picture that changes is accepted", "tasks/episodes.py", 'np.array_equal(a["image"], b["image"])', "True", "pictures"),
    ("imitates the picture", "tasks/tiny.py", "[plain_text(prompt, model, tokenizer)]", '[prompt["text"]]', "pictures"),
    ("TRL: no alpha in the advantages", "extras/on_trl.py", 'batch["advantages"] = self.alpha * advantages', 'batch["advantages"] = advantages', "on_trl"),
    ("TRL: alpha of all rounds", "extras/on_trl.py", "gradient_scale(rewards[groups])", "gradient_scale(rewards)", "on_trl"),
    ("TRL: tokens of one process", "extras/on_trl.py", '(columns["completion_mask"][i].sum() for i in rows)', '(columns["completion_mask"][i].sum() for i in rows[here])', "on_trl"),
    ("TRL: every process has the same rows", "extras/on_trl.py", "[column[i] for i in rows[here]]", "[column[i] for i in rows[:n]]", "on_trl"),
    ("TRL: every process has the same further prompts", "extras/on_trl.py", "for _ in range(G)][here]", "for _ in range(G)][:n]", "on_trl"),
    ("TRL: prompts padded on the right", "extras/on_trl.py", 'pad_first="prompt" in name', "pad_first=False", "on_trl"),
    ("TRL: F_norm ignored", "extras/on_trl.py", "group_advantages(rewards[groups], args.f_norm)", "group_advantages(rewards[groups])", "on_trl"),
    ("TRL: the optimizer steps for dead groups", "extras/on_trl.py", "dead = self.model.training and self.alpha == 0", "dead = False", "on_trl"),
    ("TRL: Adam's moments fade in a dead step", "extras/on_trl.py", "if dead and not self.is_deepspeed_enabled:", "if False:", "on_trl"),
    ("TRL: DeepSpeed steps for dead groups", "extras/on_trl.py", 'group["lr"] = 0.0', "pass", "on_trl"),
    ("TRL: evaluation by the training task", "extras/on_trl.py", "tasks[split[0]]", 'tasks["train"]', "on_trl"),
    ("TRL: CoPG without the factor K", "extras/on_trl.py", "return self.num_generations * loss", "return loss", "on_trl"),
    ("TRL: CoPG counts the rows of one process", "extras/on_trl.py", "first, K = len(inputs) * self.accelerator.process_index, self", "first, K = 0, self", "on_trl"),
    ("TRL: CoPG without the EOS", "extras/on_trl.py", "[row + [end] * (end >= 0) for row", "[row for row", "on_trl"),
    ("a run begins in the middle of a pass", "tasks/jsonl.py", "index % PROBLEMS_PER_SEED % self.size", "index % self.size", "tasks"),
    ("every pass has the same order", "tasks/jsonl.py", "seed=index - place", "seed=0", "tasks"),
    ("runs begin anywhere", "tasks/base.py", "PROBLEMS_PER_SEED * (1 + seed % 200)", "10**6 * (1 + seed % 2000)", "tasks"),
    ("a run trains on demonstrations", "tasks/base.py", "(1 + seed % 200)", "(seed % 200)", "tasks"),
    ("large seeds reach the test's", "tasks/base.py", "(1 + seed % 200)", "(1 + seed)", "tasks"),
    ("seeds beyond 2**32", "tasks/episodes.py", "2**31 + seed", "2**32 + seed", "tasks"),
    ("a split is never passed through **kwargs", "tasks/episodes.py", ' or p.kind is p.VAR_KEYWORD', "", "tasks"),
    ("constructors named by a text have no split", "tasks/episodes.py", "constructor = load_env_creator(constructor)", "constructor = lambda: None", "tasks"),
    ("a task's sys.exit ends the run", "tasks/episodes.py", "except (Exception, SystemExit) as error", "except Exception as error", "tasks"),
    ("a task's errors are taken for the script's", "tasks/episodes.py", "(OSError, RuntimeError, MemoryError, SystemExit)", "SystemExit", "tasks"),
    ("half a character is text", "tasks/episodes.py", ' and x.encode(errors="ignore").decode() == x', "", "tasks"),
    ("anything is solved", "tasks/episodes.py", "as_number(is_solved) not in (0, 1)", "False", "tasks"),
    ("NaN is an answer", "tasks/jsonl.py", "isinstance(answer, float) and not math.isfinite(answer)", "False", "tasks"),
    ("several images are ignored", "tasks/jsonl.py", 'record.get("images") is not None', "False", "tasks"),
    ("a model is cached before it is finished", "tasks/tiny.py", 'new = Path(folder) / "model"', "new = path", "tasks"),
    ("the slower of two processes fails", "tasks/tiny.py", "if not path.exists():\n                    raise", "raise", "tasks"),
]  # fmt: skip


def notices(copy: Path, tests: str) -> bool:
    """Does a test fail in this copy?"""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    files = [f"tests/test_{name}.py" for name in tests.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, *files], cwd=copy, capture_output=True, env=environment)
    return result.returncode == 1


def noticed(name: str, file: str, right: str, wrong: str, tests: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", ".venv"))
        text = (copy / file).read_text()
        assert text.count(right) == 1, f"{name}: {file} has {text.count(right)} times {right!r}"
        (copy / file).write_text(text.replace(right, wrong))
        red = notices(copy, tests)
    print(f"{'noticed' if red else 'NOT NOTICED':12} {name}", flush=True)
    return red


def main() -> int:
    chosen = [m for m in MUTATIONS if all(word in f"{m}" for word in sys.argv[1:])]
    tests = " ".join(sorted({name for *_, tests in chosen for name in tests.split()}))
    assert not notices(ROOT, tests), f"the right version fails: {tests}"
    with ThreadPoolExecutor(JOBS) as pool:
        red = list(pool.map(lambda mutation: noticed(*mutation), chosen))
    print(f"{sum(red)} of {len(chosen)} wrong versions noticed")
    return not all(red)


if __name__ == "__main__":
    sys.exit(main())
