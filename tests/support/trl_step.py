"""Two optimizer steps on one rollout under TRL's GRPOTrainer, on the CPU, in TRL's environment.

Arguments: the model's folder, and the file that gets micro-batches, weights and gradients.
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig

from examples.integrations.trl_espo import ESPOTrainer

folder, out = sys.argv[1:]
record: dict[str, list] = {"inputs": [], "gradients": [], "weights": []}


class Record(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        named = list(model.named_parameters())
        record["gradients"].append({name: p.grad.clone() for name, p in named})
        record["weights"].append({name: p.detach().clone() for name, p in named})


class Trainer(ESPOTrainer):
    def _compute_loss(self, model, inputs):
        record["inputs"].append(inputs)
        return super()._compute_loss(model, inputs)


def reward(completion_ids, **kwargs) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


config = GRPOConfig(
    output_dir=f"{out}.run",
    use_cpu=True,
    bf16=False,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_generations=4,
    num_iterations=2,
    max_completion_length=12,
    temperature=0.7,
    beta=0.0,
    learning_rate=0.5,
    lr_scheduler_type="constant",
    optim="sgd",
    max_grad_norm=0.0,
    gradient_checkpointing=False,
    max_steps=2,
    save_strategy="no",
    report_to="none",
    seed=1,
)
rows = Dataset.from_list([{"prompt": f"What is {i} + {i + 1} ?"} for i in range(4)])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
tokenizer = AutoTokenizer.from_pretrained(folder)
Trainer(
    model, reward, args=config, train_dataset=rows, processing_class=tokenizer,
    callbacks=[Record()],
).train()  # fmt: skip
torch.save(record, out)
