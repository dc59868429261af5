"""Known mistakes, which are not handed out: {question: {name: (right text, wrong text, hint)}}."""

MISTAKES = {
    "A1": {
        "Q1": {
            'KL reversed': ('kl = torch.xlogy(policy, policy / f64(ref)).sum(-1)', 'kl = torch.xlogy(f64(ref), f64(ref) / policy).sum(-1)', 'The KL is KL(pi || ref): the mean over pi of ln(pi / ref).'),
            '0 ln 0 is NaN': ('kl = torch.xlogy(policy, policy / f64(ref)).sum(-1)', 'kl = (policy * (policy / f64(ref)).log()).sum(-1)', 'An arm with the probability 0 adds 0: use torch.xlogy.'),
            'pi* without the reference': ('return (f64(ref).log() + f64(rewards) / beta).softmax(-1)', 'return (f64(rewards) / beta).softmax(-1)', 'pi* is ref exp(R / beta) / Z.'),
            'times beta': ('return (f64(ref).log() + f64(rewards) / beta).softmax(-1)', 'return (f64(ref).log() + f64(rewards) * beta).softmax(-1)', 'Divide the rewards by beta in pi*.'),
            'sign of the regret': ('return best - objective(policy, rewards, ref, beta)', 'return objective(policy, rewards, ref, beta) - best', 'The regret is J(pi*) - J(policy), never negative.'),
        },
        "Q2": {
            'a gradient through R_beta': ('beta * log_ratio.detach()', 'beta * log_ratio', 'R_beta is a weight: detach it.'),
            'no reference': ('log_ratio = log_pi - f64(ref).log()', 'log_ratio = log_pi', 'h is ln(pi / ref).'),
            'beta forgotten in R_beta': ('rewards - beta * log_ratio.detach()', 'rewards - log_ratio.detach()', 'R_beta = R - beta ln(pi / ref).'),
            'margin regardless of the preference': ('self.margin = torch.where(wins, self.h - self.h_, self.h_ - self.h)', 'self.margin = self.h - self.h_', 'The margin is h of the preferred arm minus h of the other.'),
            'both weights by mu1': ('pi.gather(-1, y_) / mu2[y_]', 'pi.gather(-1, y_) / mu1[y_]', 'y_ was drawn from mu2.'),
            'value without pi': ('self.value = (pi * rewards).sum(-1, keepdim=True)', 'self.value = rewards.mean(-1, keepdim=True)', 'E_pi[R] is the mean over the policy.'),
        },
        "Q3": {
            'beta instead of 2 beta': ('** 2 / (2 * p.beta)', '** 2 / p.beta', 'Completing the square leaves 1 / (2 beta).'),
            'sign': ('return ((p.r - p.r_) - p.beta * (p.h - p.h_)) ** 2 / (2 * p.beta)', 'return -(((p.r - p.r_) - p.beta * (p.h - p.h_)) ** 2) / (2 * p.beta)', 'The square is minimised.'),
            'half of beta': ('- p.beta * (p.h - p.h_)) ** 2', '- p.beta / 2 * (p.h - p.h_)) ** 2', 'The weights have beta / 2, the completed square has beta.'),
            'not divided by 2 beta': ('** 2 / (2 * p.beta)', '** 2', 'Divide by 2 beta, so that the gradient is eq. 18.'),
        },
        "Q4": {
            'baseline E_pi[R] for E_pi[R_beta]': ('return -((p.rb - p.value_kl) * p.logp + (p.rb_ - p.value_kl) * p.logp_)', 'return -((p.rb - p.value) * p.logp + (p.rb_ - p.value) * p.logp_)', 'pg_value_kl has the baseline E_pi[R_beta].'),
            'sign of dpo': ('return -logsigmoid(p.beta * p.margin)', 'return logsigmoid(p.beta * p.margin)', 'DPO minimises minus the log-sigmoid of the margin.'),
            'IPO regresses to 1': ('return (0.5 - p.beta * p.margin) ** 2', 'return (1 - p.beta * p.margin) ** 2', 'IPO regresses beta times the margin to 1/2.'),
            'one weight for both arms': ('p.w_ * (p.rb_', 'p.w * (p.rb_', 'Each arm has an importance weight of its own.'),
            'sign of pg': ('return -(p.rb * p.logp + p.rb_ * p.logp_)', 'return p.rb * p.logp + p.rb_ * p.logp_', 'A loss is minimised: minus the reward times ln pi.'),
        },
        "Q5": {
            'both arms from mu1': ('collect(MU[1], n_pairs, rng, env)', 'collect(MU[0], n_pairs, rng, env)', 'y_ is drawn from mu2, which is MU[1].'),
            'preferences reversed': ('np.exp(r_ - r)', 'np.exp(r - r_)', 'The probability that y wins is the sigmoid of R(y) - R(y_).'),
        },
    },
    "A2": {
        "Q1": {
            'temperature multiplied': ('logits.float() / (temperature or 1.0)', 'logits.float() * (temperature or 1.0)', 'Divide the logits by the temperature.'),
            'log-prob at temperature 1': ('return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)', 'return tokens.squeeze(1), logits.float().log_softmax(-1).gather(1, tokens).squeeze(1)', 'The log-prob is that of the distribution you sampled from.'),
            'always greedy': ('if temperature == 0:', 'if True:', 'Sample, unless the temperature is 0.'),
            'positions count the padding': ('return (mask.long().cumsum(1) - 1).clamp(min=0)', 'return torch.arange(mask.shape[1]).expand(mask.shape)', 'Position 0 is the first real token.'),
        },
        "Q2": {
            'EOS left out of the mask': ('completion_mask[running, t] = True', 'completion_mask[running, t] = ~torch.isin(tokens, stop_ids)', 'The EOS is a sampled token: it belongs to the mask.'),
            'rows in the order of completions': ('prompt_ids, prompt_mask = ids.repeat_interleave(G, 0), mask.repeat_interleave(G, 0)', 'prompt_ids, prompt_mask = ids.repeat(G, 1), mask.repeat(G, 1)', 'The G rows of a prompt are adjacent.'),
            'the EOS in the texts': ('lengths = (completion_mask.sum(1) - (~truncated).long()).tolist()', 'lengths = completion_mask.sum(1).tolist()', 'Texts end before the EOS.'),
        },
        "Q3": {
            'temperature ignored': ('torch.float32)) / temperature', 'torch.float32))', 'Score at the temperature at which you sampled.'),
            'no gradient': ('return torch.zeros_like(mask, dtype=logprobs.dtype).masked_scatter(mask, logprobs)', 'return torch.zeros_like(mask, dtype=logprobs.dtype).masked_scatter(mask, logprobs).detach()', 'The log-probs must be differentiable.'),
        },
        "Q4": {
            'budget by the sum of lengths': ('(len(batches[-1]) + block) * lengths[i] > max_tokens', 'sum(lengths[k // block] for k in batches[-1]) + lengths[i] > max_tokens', 'Padding counts: rows times the longest row.'),
            'blocks torn apart': ('batches[-1] += range(i * block, (i + 1) * block)', 'batches[-1] += [i + k * len(lengths) for k in range(block)]', 'Adjacent rows stay together.'),
        },
    },
    "A3": {
        "Q1": {
            'leave-one-out baseline': ('centred = rewards - rewards.mean(1, keepdim=True)', 'centred = (rewards - rewards.mean(1, keepdim=True)) * rewards.shape[1] / (rewards.shape[1] - 1)', 'The mean of eq. 6 includes the sample itself.'),
            'population std': ('rewards.std(1, keepdim=True)', 'rewards.std(1, keepdim=True, correction=0)', 'Divide by G - 1 in the std, which torch does by default.'),
            'no 1e-4': ('+ 1e-4', '+ 0', 'Add 1e-4 to the std.'),
            'mean of the batch': ('rewards.mean(1, keepdim=True)', 'rewards.mean()', 'Compare a reward with the mean of its own group, not of the batch.'),
            'validity by non-zero rewards': ('return rewards.amax(1) != rewards.amin(1)', 'return (rewards != 0).any(1)', 'A group is dead if its rewards are equal, not if they are 0.'),
            'validity by positive rewards': ('return rewards.amax(1) != rewards.amin(1)', 'return (rewards > 0).any(1) & (rewards <= 0).any(1)', 'A group is dead if its rewards are equal; their sign does not matter.'),
            'validity by a float std': ('return rewards.amax(1) != rewards.amin(1)', 'return rewards.std(1) > 0', 'In floating point the std of equal numbers need not be 0: compare the rewards.'),
        },
        "Q2": {
            'M counted by zero rewards': ('int(is_valid(rewards).sum())', 'int((rewards != 0).any(1).sum())', 'M counts groups whose rewards are equal, not those whose rewards are 0.'),
            'share of valid groups': ('return B / n_valid if', 'return n_valid / B if', 'Alpha is B / (B - M), at least 1.'),
            '1 if all groups are dead': ('if n_valid else 0.0', 'if n_valid else 1.0', 'If all groups are dead, return 0.0.'),
            'B over M': ('int(is_valid(rewards).sum())', 'int((~is_valid(rewards)).sum())', 'Divide by the number of valid groups, B - M, not of dead ones.'),
            'samples for groups': ('B, n_valid = len(rewards), int(is_valid(rewards).sum())', 'B, n_valid = rewards.numel(), int((group_advantages(rewards) != 0).sum())', 'Count groups: a sample of a valid group may have the advantage 0.'),
        },
        "Q3": {
            'sign': ('(-logprobs * advantages', '(logprobs * advantages', 'Your loss decreases as bad completions become more likely.'),
            'alpha dropped': ('return alpha * (-logprobs', 'return (-logprobs', 'Eq. 8 multiplies the loss by alpha.'),
            'padding counted': ('[:, None] * mask).sum()', '[:, None]).sum()', 'Columns beyond the end of a completion must not count.'),
            'total_tokens ignored': ('mask.sum() if total_tokens is None else total_tokens', 'mask.sum()', 'Divide by total_tokens if it is given, so that micro-batches add up.'),
            'divided by N T': ('mask.sum() if total_tokens is None else total_tokens', 'mask.numel() if total_tokens is None else total_tokens', 'Divide by the number of sampled tokens, not by the size of the padded tensor.'),
            'mean of each completion first': ('return alpha * (-logprobs * advantages[:, None] * mask).sum() / total_tokens', 'return alpha * ((-logprobs * advantages[:, None] * mask).sum(1) / mask.sum(1)).mean()', "Eq. 5 pools the tokens; a mean per completion is GRPO's."),
        },
        "Q4": {
            'oldest dead groups': ('.squeeze(1).flip(0)', '.squeeze(1)', 'Take the most recent dead groups: from the highest index down.'),
            'valid groups cut to B': ('return torch.cat([valid, dead[: max(0, B - len(valid))]])', 'return torch.cat([valid, dead[: max(0, B - len(valid))]])[:B]', 'Every valid group is in the batch, also when there are more than B.'),
            'no dead groups': ('return torch.cat([valid, dead[: max(0, B - len(valid))]])', 'return valid', 'Fill up with dead groups until there are B: they count in alpha and in the tokens.'),
        },
        "Q5": {
            'more than the threshold': ('if valid.sum() / B >= args.beta_th:', 'if valid.sum() / B > args.beta_th:', 'Stop as soon as the share is reached; it may be equal.'),
            'never sampled again': ('for _ in range(args.max_rounds):', 'for _ in range(1):', 'Sample again while too few groups are valid.'),
            'share of all rounds': ('if valid.sum() / B >= args.beta_th:', 'if valid.sum() / len(valid) >= args.beta_th:', 'The share is the number of valid groups of all rounds over B.'),
            'share of the last round': ('valid = is_valid(rewards)  # [rounds * B]\n            if valid.sum() / B', 'valid = is_valid(rewards)  # [rounds * B]\n            if valid[-B:].sum() / B', 'Count the valid groups of all rounds, not of the last one.'),
        },
        "Q6": {
            'alpha of all rounds': ('gradient_scale(rewards[groups])', 'gradient_scale(rewards)', 'Alpha is that of the groups in the batch.'),
            '--no-alpha ignored': ('alpha = 1.0 if args.no_alpha else gradient_scale', 'alpha = gradient_scale', 'With --no-alpha, alpha is 1.'),
            'tokens of valid groups': ('total_tokens = group_tokens[groups].sum().item()', 'total_tokens = group_tokens[valid].sum().item()', 'The tokens of dead groups in the batch count, too.'),
            'tokens of all rounds': ('total_tokens = group_tokens[groups].sum().item()', 'total_tokens = group_tokens.sum().item()', 'Only the tokens of the groups in the batch count.'),
        },
        "Q7": {
            'gradients not cleared': ('            optimizer.zero_grad()\n', '', 'Each step adds the gradients of all earlier ones: clear them.'),
            'temperature ignored': ('completion_logprobs(model, mb, args.temperature)', 'completion_logprobs(model, mb)', 'Score at the temperature at which you sampled.'),
            'advantages of the first rows': ('advantages[rows], mb.completion_mask', 'advantages[: len(rows)], mb.completion_mask', 'A micro-batch has rows of its own: take their advantages.'),
            '--f-norm ignored': ('group_advantages(rewards[valid], args.f_norm)', 'group_advantages(rewards[valid])', '--f-norm chooses how advantages are scaled.'),
            'only the first micro-batch': ('loss += mb_loss.item()', 'loss += mb_loss.item()\n                break', 'Every micro-batch has to be trained on.'),
            'divided by the number of micro-batches': ('mb_loss.backward()', '(mb_loss / len(micro_batches(live, args.micro_batch_tokens))).backward()', 'total_tokens already makes the losses of micro-batches add up.'),
            'the norm is not clipped': ('model.parameters(), args.clip_grad,', 'model.parameters(), float("inf"),', 'Clip the norm of the gradient to --clip-grad.'),
        },
    },
    "A4": {
        "Q1": {
            'rounding in dead groups': ('centred = centred * is_valid(rewards)[:, None]', 'centred = centred * 1.0', 'Equal rewards must give exactly 0, whatever rounding leaves.'),
            'population std': ('rewards.std(1, keepdim=True)', 'rewards.std(1, keepdim=True, correction=0)', 'Divide by G - 1 in the std, which torch does by default.'),
            'std for none': ('if scale == "std" else centred', 'if scale else centred', 'scale="none" only centres the rewards.'),
            'no 1e-4': ('+ 1e-4', '+ 1e-12', 'Add 1e-4 to the std.'),
        },
        "Q2": {
            'ratio reversed': ('log_ratio = ref_logprobs - logprobs', 'log_ratio = logprobs - ref_logprobs', 'The ratio is pi_ref / pi.'),
            'k1': ('return log_ratio.expm1() - log_ratio', 'return -log_ratio', 'That is k1, the log-ratio alone; eq. 4 is k3.'),
            'k2': ('return log_ratio.expm1() - log_ratio', 'return log_ratio**2 / 2', 'That is k2, half of the squared log-ratio; eq. 4 is k3.'),
            'inaccurate for small differences': ('return log_ratio.expm1() - log_ratio', 'return log_ratio.exp() - 1 - log_ratio', 'exp(x) - 1 loses digits for small x: use torch.expm1.'),
        },
        "Q3": {
            'sign': ('return -(J * mask).sum() / total', 'return (J * mask).sum() / total', 'J is maximised, the loss minimised.'),
            'maximum for minimum': ('J = torch.min(ratio * A', 'J = torch.max(ratio * A', 'Eq. 3 takes the minimum of the two terms.'),
            'clips swapped': ('ratio.clamp(1 - clip_low, 1 + clip_high)', 'ratio.clamp(1 - clip_high, 1 + clip_low)', 'clip_low bounds the ratio from below, clip_high from above.'),
            'no unclipped term': ('J = torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)', 'J = ratio.clamp(1 - clip_low, 1 + clip_high) * A', 'Take the minimum with the term that is not clipped.'),
            'KL added to the objective': ('J = J - kl_beta * kl_k3', 'J = J + kl_beta * kl_k3', 'The KL is a cost.'),
            '1/|o_i| forgotten': ('J = J / mask.sum(1, keepdim=True)', 'J = J / 1.0', 'With aggregate="sequence" a row is divided by its length.'),
            'total ignored': ('batch_total(mask, aggregate, mask.shape[1]) if total is None else total', 'batch_total(mask, aggregate, mask.shape[1])', 'Divide by total if it is given, so that micro-batches add up.'),
        },
        "Q4": {
            'sign of the advantage ignored': ('return (up & (ratio > 1 + clip_high)) | (down & (ratio < 1 - clip_low))', 'return (ratio > 1 + clip_high) | (ratio < 1 - clip_low)', 'Only where the advantage pushes the ratio further out does the clip take the gradient.'),
            'the wrong side': ('return (up & (ratio > 1 + clip_high)) | (down & (ratio < 1 - clip_low))', 'return (down & (ratio > 1 + clip_high)) | (up & (ratio < 1 - clip_low))', 'A positive advantage pushes the ratio up.'),
            'one order for all passes': ('return [rows for _ in range(mu) for rows in torch.randperm(N).tensor_split(n_minibatches)]', 'order = torch.randperm(N)\n    return [rows for _ in range(mu) for rows in order.tensor_split(n_minibatches)]', 'Shuffle anew for every pass.'),
            'not shuffled': ('torch.randperm(N).tensor_split', 'torch.arange(N).tensor_split', 'Rows come in a random order.'),
        },
        "Q5": {
            'no dynamic sampling': ('for _ in range(args.max_rounds):', 'for _ in range(1):', 'With --dynamic-sampling, sample again until B groups are valid.'),
            'until all groups are valid': ('if valid.sum() >= B:', 'if valid.all():', 'Stop when B groups of all rounds are valid.'),
            'valid groups of the last round': ('if valid.sum() >= B:', 'if valid[-B:].sum() >= B:', 'Count the valid groups of all rounds.'),
        },
        "Q6": {
            'rows of the first groups': ('rows = (groups[:, None] * G + torch.arange(G)).flatten()', 'rows = torch.arange(len(groups) * G)', 'Take the rows of the chosen groups.'),
            'advantages of the first groups': ('group_advantages(rewards[groups], args.scale)', 'group_advantages(rewards[: len(groups)], args.scale)', 'Take the rewards of the chosen groups.'),
            '--scale ignored': ('group_advantages(rewards[groups], args.scale)', 'group_advantages(rewards[groups])', '--scale chooses how advantages are scaled.'),
        },
        "Q7": {
            'gradients not cleared': ('            optimizer.zero_grad()\n', '', 'Each update adds the gradients of all earlier ones: clear them.'),
            'only the first micro-batch': ('loss += mb_loss.item()', 'loss += mb_loss.item()\n                break', 'Every micro-batch has to be trained on.'),
            'divided by the number of micro-batches': ('mb_loss.backward()', '(mb_loss / len(micro_batches(live, args.micro_batch_tokens))).backward()', 'total already makes the losses of micro-batches add up.'),
            'dead rows out of the total': ('index, mask = index.to(model.device), batch.completion_mask[index]', 'index = index.to(model.device)\n            mask = batch.completion_mask[index[advantages[index] != 0]]', 'Dead rows count in the total.'),
            'old log-probs are the current ones': ('mb.logprobs,\n                    A[rows]', 'logprobs, logprobs.detach(), A[rows]', 'The ratio is to the policy that sampled, also in the second update.'),
        },
    },
    "A5": {
        "Q1": {
            'divided by G': ('return pairs.sum(1).mean() / (G - 1)', 'return pairs.sum(1).mean() / G', 'Divide the sum over pairs by G - 1.'),
            'mean over pairs': ('return pairs.sum(1).mean() / (G - 1)', 'return pairs.mean()', 'Sum over the pairs of a prompt, then divide by G - 1.'),
            'beta instead of 2 beta': ('** 2 / (2 * beta)', '** 2 / beta', 'Completing the square leaves 1 / (2 beta).'),
            'beta forgotten': ('R_beta = rewards - beta * logratios', 'R_beta = rewards - logratios', 'R_beta = R - beta h.'),
            'every pair twice': ('i, j = torch.triu_indices(G, G, 1)', 'i, j = torch.cartesian_prod(torch.arange(G), torch.arange(G)).T', 'Each pair counts once.'),
        },
        "Q2": {
            'IPO regresses to 1': ('((0.5 - beta * (h_chosen - h_rejected)) ** 2)', '((1 - beta * (h_chosen - h_rejected)) ** 2)', 'IPO regresses beta times the margin to 1/2.'),
            'sign of dpo': ('return -logsigmoid(beta * (h_chosen - h_rejected)).mean()', 'return logsigmoid(beta * (h_chosen - h_rejected)).mean()', 'DPO minimises minus the log-sigmoid of the margin.'),
            'sum for mean': ('return ((0.5 - beta * (h_chosen - h_rejected)) ** 2).mean()', 'return ((0.5 - beta * (h_chosen - h_rejected)) ** 2).sum()', 'The losses are means over prompts.'),
            'best and worst swapped': ('(h_best, h_worst, beta)', '(h_worst, h_best, beta)', 'The chosen completion comes first.'),
        },
        "Q3": {
            'sign': ('return -logsigmoid(score_chosen - score_rejected).mean()', 'return logsigmoid(score_chosen - score_rejected).mean()', 'Minimise minus the log-likelihood of the preferences.'),
        },
        "Q4": {
            'repeated facts count twice': ('for clause in set(stated) if clause in worth', 'for clause in stated if clause in worth', 'A fact counts once.'),
            'words cost nothing': ('return utility - 0.1 * len(completion.replace(";", "").split())', 'return utility', 'Each word costs 0.1.'),
            'semicolons are words': ('len(completion.replace(";", "").split())', 'len(completion.split())', 'The separator is no word.'),
            'anything else is free': ('utility -= sum(clause not in worth for clause in stated)', 'utility -= 0', 'A clause that is no fact costs 1.'),
        },
    },
}  # fmt: skip
