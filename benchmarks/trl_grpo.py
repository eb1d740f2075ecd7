"""TRL's part of the step benchmark: prints its versions and the seconds of each step as JSON.

Runs in an environment with TRL (step_vs_trl.py makes it). One process with all threads, one
optimizer step for each batch of completions, no reference model (beta 0), no gradient
checkpointing, float32, generation by transformers (TRL's vLLM modes need a GPU).
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
    """Seconds between the ends of optimizer steps: generation, rewards, loss, update."""

    def __init__(self):
        self.seconds, self._last = [], None

    def on_step_begin(self, *args, **kwargs):
        self._last = self._last or time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        text = f"trl: step {len(self.seconds)}: {self.seconds[-1]:.1f} s"
        print(text, file=sys.stderr, flush=True)


def last_integer(completions: list[list[dict]], answer: list[str], **kwargs) -> list[float]:
    """:func:`judge` as a reward function of TRL."""
    pairs = zip(answer, completions, strict=True)
    return [judge(expected, message[0]["content"]) for expected, message in pairs]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    for name in ("model", "output", "prompts"):
        parser.add_argument(f"--{name}", required=True)
    sizes = ("steps", "prompts-per-step", "group-size", "max-response-tokens", "micro-batch")
    for name in sizes:
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()

    rows = []
    for line in Path(args.prompts).read_text().splitlines():
        row = json.loads(line)
        message = {"role": "user", "content": row["prompt"]}
        rows.append({"prompt": [message], "answer": row["answer"]})
    dataset = Dataset.from_list(rows)
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
    trainer = trl.GRPOTrainer(
        args.model, last_integer, args=config, train_dataset=dataset, callbacks=[clock]
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    report = {
        "versions": {module.__name__: module.__version__ for module in (trl, torch, transformers)},
        "seconds": clock.seconds,
        "reward": [entry["reward"] for entry in history],
        "length": [entry["completions/mean_length"] for entry in history],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
