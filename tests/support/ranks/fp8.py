"""Log-probs with and without 8-bit matrix products."""

from megatron_espo.config import Config, Data, Megatron, Model
from megatron_espo.distributed import runtime
from tests.support.ranks.step import make_batch
from tests.support.weights_models import load_spec


def gap(folder: str) -> float:
    """Mean |difference| of response log-probs, nats."""
    place = runtime.initialize()
    from megatron_espo.megatron.actor import Actor

    spec, scores = load_spec(folder), []
    pairs = [(prompt, response) for prompt, response, _ in make_batch(spec.vocab_size)]
    for fp8 in (None, "hybrid"):
        config = Config(
            model=Model(path=folder, dtype="bfloat16"),
            data=Data(prompts="p.jsonl"),
            megatron=Megatron(fp8=fp8),
        )
        scores.append(
            [value for values in Actor(config, spec, place).score(pairs) for value in values]
        )
    return sum(abs(a - b) for a, b in zip(*scores, strict=True)) / len(scores[0])
