"""The task of ``compare_objectives.py``: a Llama of one million parameters that adds numbers.

The model reads ``347+586=`` and writes one column after the other from the right, each with its
carry, then the sum: ``7+6=13,4+8+1=13,3+5+1=9;933``. Only the sum counts.
"""

import json
import random
import tempfile
from pathlib import Path

TOKENS = ["<pad>", "<s>", "</s>", *"0123456789+=,;"]
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,  # the smallest that vLLM serves on a CPU
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "vocab_size": len(TOKENS),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DIGITS = 3
SIZES = {"train": 40_000, "validation": 256, "test": 512}
START = 0.25  # the supervised start ends at this share of correct sampled responses
RESPONSE_TOKENS = 40


def correct(prompt, response: str) -> float:
    """Return 1 if the text after the last ``;`` is the sum."""
    return float(response.rpartition(";")[2].strip() == prompt.answer)


def solution(a: int, b: int) -> str:
    """Return the columns of ``a + b`` from the right, and the sum."""
    columns, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        digit_sum = int(x) + int(y) + carry
        columns.append(f"{x}+{y}{'+1' if carry else ''}={digit_sum}")
        carry = digit_sum // 10
    return f"{','.join(columns)};{a + b}"


def pairs(count: int, seed: int) -> list[tuple[int, int]]:
    """Return ``count`` different pairs of numbers of :data:`DIGITS` digits."""
    draw = random.Random(seed)
    low, high = 10 ** (DIGITS - 1), 10**DIGITS - 1
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        found[draw.randint(low, high), draw.randint(low, high)] = None
    return list(found)


def prepare(folder: Path) -> None:
    """Write the model, its tokenizer and the prompts into ``folder``, unless they are there.

    The prompts of the three splits are all different.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    rest = pairs(sum(SIZES.values()), seed=1)
    for split, size in SIZES.items():
        rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in rest[:size]]
        (aside / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rest = rest[size:]
    _train(aside)
    aside.rename(folder)  # complete or absent


def _tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {token: number for number, token in enumerate(TOKENS)}
    tokens = Tokenizer(models.WordLevel(table, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokens.decoder = decoders.Fuse()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, **names)


def _train(folder: Path) -> None:
    """Train on solutions until :data:`START`, and save the model."""
    import torch
    from tqdm import tqdm
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    tokenizer = _tokenizer()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    examples = pairs(200_000, seed=2)
    held_out = pairs(256, seed=3)
    accuracy, bar = 0.0, tqdm(desc="supervised start", unit="step")
    while accuracy < START:
        some = examples[64 * bar.n : 64 * (bar.n + 1)]
        texts = [(f"{a}+{b}=", solution(a, b)) for a, b in some]
        ids = tokenizer([p + s + "</s>" for p, s in texts], padding=True, return_tensors="pt")
        labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
        labels[:, : len(texts[0][0])] = -100  # all prompts are equally long
        loss = model(**ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        if bar.n % 20 == 0:
            accuracy = _accuracy(model, tokenizer, held_out)
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.3f}")
    bar.close()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _accuracy(model, tokenizer, some: list[tuple[int, int]]) -> float:
    import torch

    ids = tokenizer([f"{a}+{b}=" for a, b in some], return_tensors="pt")
    with torch.no_grad():
        written = model.generate(
            **ids, do_sample=True, top_k=0, max_new_tokens=RESPONSE_TOKENS, pad_token_id=0
        )
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    right = [t.rpartition(";")[2] == str(a + b) for t, (a, b) in zip(texts, some, strict=True)]
    return sum(right) / len(right)
