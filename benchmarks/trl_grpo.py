"""TRL's side of the step benchmark: prints the versions it ran with and the seconds of each step, as one JSON line.

Runs in an environment that has TRL (step_vs_trl.py makes one). One process with all threads; one optimizer step for
each batch of completions; no reference model (beta 0), no gradient checkpointing, float32, generation by transformers
(TRL's vLLM modes need a GPU).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import transformers
import trl
from addition import judge
from datasets import Dataset


class StepClock(transformers.TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next: generation, rewards, loss, update."""

    def __init__(self):
        self.seconds, self._last = [], None

    def on_step_begin(self, *args, **kwargs):
        self._last = self._last or time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        print(f"trl: step {len(self.seconds)}: {self.seconds[-1]:.1f} s", file=sys.stderr, flush=True)


def last_integer(completions: list[list[dict[str, str]]], answer: list[str], **kwargs) -> list[float]:
    """TRL's signature for a reward function."""
    return [judge(expected, message[0]["content"]) for expected, message in zip(answer, completions, strict=True)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--prompts-per-step", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--max-response-tokens", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, required=True, help="responses in one forward and backward")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()

    rows = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in rows]
    )
    batch = args.prompts_per_step * args.group_size
    config = trl.GRPOConfig(
        output_dir=args.output,
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32", "local_files_only": True},
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=batch // args.micro_batch,
        generation_batch_size=batch,
        num_generations=args.group_size,
        num_iterations=1,
        max_completion_length=args.max_response_tokens,
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        shuffle_dataset=False,
        max_steps=args.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )
    clock = StepClock()
    trainer = trl.GRPOTrainer(args.model, last_integer, args=config, train_dataset=dataset, callbacks=[clock])
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    versions = {module.__name__: module.__version__ for module in (trl, torch, transformers)}
    rewards = [entry["reward"] for entry in history]
    lengths = [entry["completions/mean_length"] for entry in history]
    json.dump({"versions": versions, "seconds": clock.seconds, "reward": rewards, "length": lengths}, sys.stdout)


if __name__ == "__main__":
    main()
