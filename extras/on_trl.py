"""GPG and CoPG on more than one GPU: the gradients of gpg.py and copg.py from TRL's trainers.

TRL brings what the scripts leave out: several processes and machines, ZeRO, FSDP, vLLM. It is the
only addition: pip install "trl==1.16.*". This file turns its GRPOTrainer into GPG and its
RLOOTrainer into CoPG, with the functions of gpg.py and copg.py.

    GPG   eq. 5       loss_type "dapo": as in gpg.py, one mean over the tokens of all processes
          eq. 6-8     the loss is linear in the advantages, so alpha is a factor of them
          Algorithm 1 rounds of B groups until the share of valid ones in all processes is beta_th
    CoPG  eq. 18-19   RLOO of given completions, with rewards R - beta h; G times its gradient

| what differs from gpg.py and copg.py | here                                                    |
| ------------------------------------ | ------------------------------------------------------- |
| B, the groups of a step              | what TRL's flags make: processes x rows x accumulation  |
|                                      | / G, with --per_device_train_batch_size for the rows    |
| more than B valid groups             | the first B (gpg.py: all of them)                       |
| dead groups beside valid ones        | go through the model, for a gradient of 0               |
| prompts of further rounds            | the same data set, in an order of its own               |
| the learning rate's warm-up          | begins at 0, so that the first step moves nothing       |
| models with absolute positions       | (GPT-2) TRL counts the padding of a prompt: not for it  |
| CoPG's ln pi_ref                     | computed at every step; the file's own is not read      |
| a prompt beyond the model's context  | is not refused                                          |
| a step without a valid group         | skipped, too; DeepSpeed: made, at a learning rate of 0  |
| runs, metrics, resuming              | those of TRL: --output_dir, --report_to ...             |
| all weights are trained              | --use_peft: adapters (LoRA) of frozen weights           |

    accelerate launch extras/on_trl.py gpg  --model Qwen/Qwen2.5-7B-Instruct --task gsm8k
    accelerate launch extras/on_trl.py copg --model Qwen/Qwen2.5-7B-Instruct --data pairs.jsonl

Every flag of TRL's GRPOConfig or RLOOConfig works, too; its --beta is CoPG's. For GPG,
--eval_strategy steps evaluates on 200 held-out problems: eval_reward and eval_solved.
--use_peft, with TRL's --lora_r, --lora_alpha, --lora_target_modules ..., trains LoRA adapters (pip
install peft). They are saved in the folder `adapter` and, except with DeepSpeed and FSDP, merged
into the model that is saved.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run
from copg import shuffled_passes
from gpg import fill_batch, gradient_scale, group_advantages, is_valid
from run import plain_errors
from tasks import UserError, first_problem, get_prompts, get_rewards, held_out, make_task
from tasks.episodes import get_size
from tasks.pairs import read_records
from tasks.prompts import as_messages, end_of_answer
from tasks.tiny import tiny_model

try:
    import trl
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, ModelConfig, RLOOConfig, RLOOTrainer, TrlParser
    from trl import get_peft_config as trl_peft_config
    from trl.trainer.utils import pad

    if not trl.__version__.startswith("1.16."):  # its private methods are overridden below
        raise ImportError
except ImportError:
    sys.exit('on_trl.py: pip install "trl==1.16.*"')

# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------


def say(default, text: str):
    """A field with this default and this line in --help."""
    return field(default=default, metadata={"help": text})


# TRL's flags of LoRA; without its dropout, which --disable_dropout would undo.
NAMES = "use_peft lora_r lora_alpha lora_target_modules lora_target_parameters lora_modules_to_save"
LORA = [x for x in fields(ModelConfig) if x.name in f"{NAMES} use_rslora use_dora".split()]
LoRA = make_dataclass("LoRA", [(x.name, x.type, say(x.default, x.metadata["help"])) for x in LORA])


@dataclass
class Arguments(LoRA):
    model: str = say("tiny", "tiny, a Hugging Face directory or id")
    no_chat_template: bool = say(False, "give the model the bare prompt")


@dataclass
class GPGArguments(Arguments):
    task: str = say("add", "add, gsm8k, file.jsonl, module:Name-v0")
    problems: int = say(8000, "training problems of a task that is endless")


@dataclass
class CoPGArguments(Arguments):
    data: str | None = say(None, "file.jsonl of scored completions or preferences")


@dataclass
class GPGConfig(GRPOConfig):
    """TRL's flags with the values of eq. 5, and GPG's own."""

    f_norm: Literal["1", "std"] = say("1", "eq. 6")
    alpha: bool = say(True, "eq. 7; --no_alpha: alpha = 1 in eq. 8")
    beta_th: float = say(0.6, "0: off")
    max_rounds: int = say(4, "at most this many batches per step")

    loss_type: str = say("dapo", "eq. 5 over the whole batch, as in gpg.py")
    scale_rewards: str = say("none", "leave it: --f_norm scales the advantages")
    disable_dropout: bool = say(True, "the policy that is scored is the policy that was sampled")
    vllm_importance_sampling_correction: bool = say(False, "eq. 5 has no ratio")
    lr_scheduler_type: str = say("constant_with_warmup", "as in gpg.py")
    warmup_steps: float = say(10, "as in gpg.py")
    num_train_epochs: float = say(1.0, "passes over the problems")
    logging_steps: float = say(1, "steps between two logs")
    output_dir: str | None = say("runs/trl-gpg", "directory of the run, new or empty")

    def __post_init__(self):
        prepare(self, super().__post_init__)
        if not (0 <= self.beta_th <= 1 and self.max_rounds >= 1):
            raise UserError("--beta_th is a share, and --max_rounds is 1 or more")
        if self.scale_rewards != "none":
            raise UserError("--scale_rewards does nothing: --f_norm scales the advantages")


@dataclass
class CoPGConfig(RLOOConfig):
    """TRL's flags with the values of copg.py."""

    beta: float = say(0.06, "of eq. 2; .06 is the best one of the paper")
    disable_dropout: bool = say(True, "the policy and its reference are compared without noise")
    lr_scheduler_type: str = say("constant_with_warmup", "as in copg.py")
    warmup_steps: float = say(0.1, "as in copg.py")
    num_train_epochs: float = say(2.0, "passes over the data")
    logging_steps: float = say(1, "steps between two logs")
    output_dir: str | None = say("runs/trl-copg", "directory of the run, new or empty")

    def __post_init__(self):
        prepare(self, super().__post_init__)


def prepare(config, trl_checks) -> None:
    """TRL's own checks, and those that its flags need here. Raises UserError."""
    if config.bf16 is None:  # as in common.autocast; the weights are fp32
        config.bf16 = torch.cuda.is_available() and not config.fp16
    trl_checks()
    if int(os.environ.get("WORLD_SIZE", "1")) != config.world_size:  # accelerate says nothing
        raise UserError("the processes do not see each other; without a GPU, add --use_cpu")
    if config.num_iterations != 1:
        raise UserError("--num_iterations: GPG and CoPG make one update per batch")
    if config.steps_per_generation != config.gradient_accumulation_steps:
        raise UserError("--steps_per_generation and --generation_batch_size: a batch is one step")
    out = Path(config.output_dir)
    if out.is_dir() and any(out.iterdir()) and not config.resume_from_checkpoint:
        raise UserError(f"--output_dir {out} is not empty; name another")


# --------------------------------------------------------------------------------------------------
# GPG
# --------------------------------------------------------------------------------------------------


class GPGTrainer(GRPOTrainer):
    """GRPOTrainer with the batch of GPG: steps 1 and 2 of gpg.train."""

    alpha = 1.0  # of the batch; 0.0: every group is dead

    def _calculate_rewards(self, *args) -> Tensor:
        rewards = super()._calculate_rewards(*args)  # [N of all processes, reward functions]
        self.rewards = (rewards * self.reward_weights.to(rewards)).sum(1).cpu()  # [N]
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Tensor]:
        """The n rows of this process, which is one of many -> its n rows of the update."""
        if not self.model.training:  # an evaluation
            return super()._generate_and_score_completions(inputs)
        args, accelerator = self.args, self.accelerator
        G, n = self.num_generations, len(inputs)
        B = n * accelerator.num_processes // G
        here = slice(n * accelerator.process_index, n * (accelerator.process_index + 1))

        # 1. Sample with the current policy until enough groups are valid (Algorithm 1).
        columns, rewards = defaultdict(list), torch.zeros(0, G)  # rows of all processes
        for r in range(args.max_rounds):
            if r > 0:
                first = (self.state.global_step * args.max_rounds + r) * B
                problems = shuffled_passes(first, B, len(self.train_dataset), args.seed)
                inputs = [self.train_dataset[i] for i in problems for _ in range(G)][here]
            batch = super()._generate_and_score_completions(inputs)
            for name, rows in batch.items():
                if rows.dim() == 2:  # [n, P] or [n, T]; others are set below
                    rows = accelerator.pad_across_processes(rows, 1, pad_first="prompt" in name)
                    columns[name] += accelerator.gather(rows)
            rewards = torch.cat([rewards, self.rewards.view(B, G)])  # [rounds * B, G]
            valid = is_valid(rewards)  # [rounds * B]
            if valid.sum() / B >= args.beta_th:
                break

        # 2. Choose the groups of the update; their advantages, times alpha, and their tokens.
        groups = fill_batch(valid, B)[:B]
        self.alpha = gradient_scale(rewards[groups])
        if not args.alpha and self.alpha > 0:
            self.alpha = 1.0
        advantages = group_advantages(rewards[groups], args.f_norm) * valid[groups, None]  # [B, G]
        rows = (groups[:, None] * G + torch.arange(G)).flatten().tolist()  # B * G
        batch = {
            name: pad([column[i] for i in rows[here]], 0, "left" if "prompt" in name else "right")
            for name, column in columns.items()
        }
        batch["advantages"] = self.alpha * advantages.flatten()[here].to(accelerator.device)
        batch["num_items_in_batch"] = sum(columns["completion_mask"][i].sum() for i in rows)

        log = {"valid_share": valid, "all_right": ~valid & (rewards[:, 0] > 0)}
        log |= {"all_wrong": ~valid & (rewards[:, 0] <= 0)}
        log = {name: groups.double().mean().item() for name, groups in log.items()}
        for name, value in (log | {"alpha": self.alpha, "rounds": r + 1}).items():
            self._metrics["train"][name].append(value)
        return batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss. If every group is dead, no parameter gets a gradient, so none is moved."""
        dead = self.model.training and self.alpha == 0  # in all processes or in none
        if dead and not self.is_deepspeed_enabled:
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        if dead:  # DeepSpeed steps in any case; the schedule sets the rate again after the step
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def make_dataset(task, split: str, problems: list[int], tokenizer) -> Dataset:
    """Problems of a task as a data set for TRL, which applies the chat template to messages."""
    prompts = as_chats(get_prompts(task, problems), tokenizer)
    columns = {"prompt": prompts, "problem": problems, "split": [split] * len(problems)}
    return Dataset.from_dict(columns)


def as_chats(prompts: list, tokenizer) -> list:
    return [as_messages(prompt) for prompt in prompts] if tokenizer.chat_template else prompts


def make_reward(tasks: dict, tokenizer):
    """The tasks of the splits as a reward function for TRL: one problem a row."""

    stop_ids = tokenizer.eos_token_id, end_of_answer(tokenizer)

    def task_reward(completion_ids, problem, split, log_metric, **_) -> list[float]:
        rows = [ids[:-1] if ids[-1] in stop_ids else ids for ids in completion_ids]
        texts = tokenizer.batch_decode(rows)
        rewards, solved = get_rewards(tasks[split[0]], problem, texts)  # [n, 1]
        log_metric("solved", solved.double().mean().item())
        return rewards.flatten().tolist()

    return task_reward


def gpg_trainer(args: GPGArguments, config: GPGConfig) -> GPGTrainer:
    """Raises UserError."""
    with config.main_process_first():  # it may have to download
        tasks = {split: make_task(args.task, split) for split in ("train", "test")}
        model, tokenizer = find_model(args, tasks["train"])
    size, first = get_size(tasks["train"]), 0
    if size is None:  # endless; the first problems are those that the tiny model imitates
        size, first = args.problems, first_problem(config.seed)
    if size * config.num_generations < config.generation_batch_size:
        raise UserError(f"--task {args.task}: {size} problems are fewer than the groups of a step")
    problems = list(range(first, first + size))
    data = make_dataset(tasks["train"], "train", problems, tokenizer)
    eval_data = None
    if config.eval_strategy != "no":
        problems = [i for batch in held_out(tasks["test"], 200) for i in batch]
        eval_data = make_dataset(tasks["test"], "test", problems, tokenizer)
    reward, lora = make_reward(tasks, tokenizer), lora_config(args)
    return GPGTrainer(
        model, reward, config, data, eval_data, processing_class=tokenizer, peft_config=lora
    )


# --------------------------------------------------------------------------------------------------
# CoPG
# --------------------------------------------------------------------------------------------------


class CoPGTrainer(RLOOTrainer):
    """RLOOTrainer on completions that somebody else has written."""

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Tensor]:
        first, G = len(inputs) * self.accelerator.process_index, self.num_generations
        # TRL puts the G rows of a prompt side by side: the i-th row gets completion i mod G.
        self.texts = [row["texts"][i % G] for i, row in enumerate(inputs, first)]
        self.ends = [row["ends"][i % G] for i, row in enumerate(inputs, first)]
        inputs = [row | {"score": row["scores"][i % G]} for i, row in enumerate(inputs, first)]
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields) -> list[list[int]]:
        rows = self._tokenizer(self.texts, add_special_tokens=False).input_ids
        ends = zip(rows, self.ends, strict=True)
        return [[*row, end] if end >= 0 else row for row, end in ends]  # -1: it was truncated

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """RLOO is a mean over all rows, copg_loss a mean over prompts: G times as much."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self.num_generations * loss


def given_reward(score, **_) -> list[float]:
    return score


def copg_trainer(args: CoPGArguments, config: CoPGConfig) -> CoPGTrainer:
    """Raises UserError."""
    if not args.data:
        raise UserError("--data file.jsonl is needed")
    records = [record for record in read_records(args.data) if not record.held_out]
    n, G = len(records), len(records[0].completions)
    if records[0].rewards is None:
        raise UserError(f"{args.data}: no rewards in it")
    if config.num_generations != G:
        raise UserError(f"--num_generations {G} is needed: {args.data} has {G} per prompt")
    if n * G < config.generation_batch_size:
        raise UserError(f"{args.data}: {n} training prompts are fewer than those of a step")
    with config.main_process_first():
        model, tokenizer = find_model(args)
    eos = end_of_answer(tokenizer)
    dataset = Dataset.from_dict(
        {
            "prompt": as_chats([record.prompt for record in records], tokenizer),
            "texts": [record.completions for record in records],
            "ends": [record.ends or [-1 if eos is None else eos] * G for record in records],
            "scores": [record.rewards for record in records],
        }
    )
    lora = lora_config(args)  # the reference is the model without the adapters
    return CoPGTrainer(
        model, given_reward, config, dataset, processing_class=tokenizer, peft_config=lora
    )


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def find_model(args, task=None):
    """-> (name, tokenizer). By its name, ZeRO-3 can load a model in pieces."""
    name = tiny_model(task or make_task("add")) if args.model == "tiny" else args.model
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if args.no_chat_template:
        tokenizer.chat_template = None
    return name, tokenizer


def lora_config(args):
    """The LoraConfig of the flags, or None. Raises UserError."""
    flags = {x.name: getattr(args, x.name) for x in LORA}
    changed = [x.name for x in LORA if flags[x.name] != x.default]
    if changed and not args.use_peft:
        raise UserError(f"--{changed[0]} has no effect without --use_peft")
    return trl_peft_config(ModelConfig(lora_dropout=0.0, **flags))


class Parser(run.Parser, TrlParser):
    """TrlParser, with its complaints as one-line errors."""


COMMANDS = {
    "gpg": (GPGArguments, GPGConfig, gpg_trainer),
    "copg": (CoPGArguments, CoPGConfig, copg_trainer),
}


def main(argv: list[str] | None = None) -> GPGTrainer | CoPGTrainer:
    """Raises UserError."""
    argv = sys.argv[1:] if argv is None else argv
    parser = run.Parser("on_trl.py", description="GPG and CoPG on TRL's trainers.")
    parser.add_argument("command", choices=COMMANDS, help="then flags: gpg --help shows them")
    command, flags = parser.parse_args(argv[:1]).command, argv[1:]
    *classes, make_trainer = COMMANDS[command]
    try:
        args, config = Parser(classes, prog=f"on_trl.py {command}").parse_args_and_config(flags)
        trainer = make_trainer(args, config)
    except (ValueError, OSError) as error:  # TRL's and transformers' own checks
        raise UserError(" ".join(str(error).split())) from error
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if args.use_peft:
        trainer.save_model(f"{config.output_dir}/adapter")
    if args.use_peft and not sharded:  # in fp32: bf16 would round the sum
        model = trainer.accelerator.unwrap_model(trainer.model).to("cpu", torch.float32)
        trainer.model = model.merge_and_unload()
    if not (args.use_peft and sharded):
        trainer.save_model()  # a Hugging Face directory: output_dir
    trainer.save_state()  # with all metrics: trainer_state.json
    return trainer


if __name__ == "__main__":
    with plain_errors("on_trl.py"):
        main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
