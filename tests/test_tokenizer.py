"""Tokenizers against the libraries: a SentencePiece model, and a byte-level BPE trained here."""

import json
import shutil
from pathlib import Path

import mistral_common
import pytest
from sentencepiece import SentencePieceProcessor

from megatron_espo.data import load_tokenizer
from megatron_espo.errors import InputError

MISTRAL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_hf_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A byte-level BPE with a beginning-of-sequence post-processor, eos ``<|im_end|>`` and a ChatML
    template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator(["What is 2 + 2? The answer is 4."] * 4, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def test_sentencepiece_file_matches_the_library():
    reference = SentencePieceProcessor(model_file=str(MISTRAL))
    tokenizer = load_tokenizer(MISTRAL)
    text = "What is 12 + 30? Ünïcode 数学"
    assert tokenizer.encode_prompt(text) == [reference.bos_id(), *reference.encode(text)]
    assert tokenizer.decode([*tokenizer.encode_prompt(text), reference.eos_id()]) == text
    assert (
        tokenizer.eos_ids == {2}
        and tokenizer.vocab_size == 32000
        and tokenizer.render(text) == text
    )
    with pytest.raises(InputError, match="need a chat template"):
        tokenizer.encode_prompt([{"role": "user", "content": text}])


def test_sentencepiece_folder_with_model_configs(tmp_path):
    shutil.copy(MISTRAL, tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 32064, "eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == {2, 7, 9} and tokenizer.vocab_size == 32064
    assert (
        tokenizer.decode([*tokenizer.encode_prompt("four"), 32063]) == "four"
    )  # a column without a piece
    shutil.copy(MISTRAL, tmp_path / "other.model")
    with pytest.raises(InputError, match="exactly one.*other.model, tokenizer.model"):
        load_tokenizer(tmp_path)


def test_hugging_face_chat_and_text(tmp_path):
    tokenizer = load_tokenizer(write_hf_tokenizer(tmp_path))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 2?"},
    ]
    rendered = "<|im_start|>system\nBe brief.<|im_end|>\n"
    rendered += "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.has_chat_template and tokenizer.render(messages) == rendered
    ids = tokenizer.encode_prompt(messages)
    assert (
        ids[0] == 1 and ids.count(1) == 3 and ids.count(2) == 2 and 0 not in ids
    )  # the template wrote no <s>
    assert tokenizer.encode_prompt("What")[0] == 0  # plain text gets it
    # Rendered text has it already.
    assert tokenizer.encode_prompt("<s>What") == tokenizer.encode_prompt("What")
    pieces = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    text = " 数学 .  2 , 2"
    assert tokenizer.decode([*tokenizer.encode_prompt(text), 2]) == text
    assert tokenizer.eos_ids == {2} and tokenizer.vocab_size == len(pieces)


def test_eos_and_vocab_come_from_the_model_folder(tmp_path):
    folder, model = write_hf_tokenizer(tmp_path / "tokenizer"), tmp_path / "model"
    model.mkdir()
    config = {"eos_token_id": None, "text_config": {"vocab_size": 512, "eos_token_id": 3}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 4}))
    tokenizer = load_tokenizer(folder, model_path=model)
    assert tokenizer.eos_ids == {2, 4} and tokenizer.vocab_size == 512
    # config.json counts where generation_config.json names no token.
    for declared, expected in (([-1, 4], {2, 4}), ([-1], {2, 3}), (None, {2, 3})):
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
        assert load_tokenizer(folder, model_path=model).eos_ids == expected


def test_errors_of_a_template_are_input_errors(tmp_path):
    template = "{{ raise_exception('system role not supported') }}"
    tokenizer = load_tokenizer(write_hf_tokenizer(tmp_path, template))
    with pytest.raises(InputError, match="system role not supported"):
        tokenizer.render([{"role": "system", "content": "x"}])
    untemplated = load_tokenizer(write_hf_tokenizer(tmp_path / "plain", None))
    with pytest.raises(InputError, match="needs? a chat template"):
        untemplated.render([{"role": "user", "content": "x"}])


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(InputError, match="openai-community/gpt2: expected one of tokenizer.json"):
        load_tokenizer("openai-community/gpt2")
    with pytest.raises(InputError, match="tokenizer.json.*got none"):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match="broken.model is not a readable SentencePiece"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="that transformers can load, got"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(
        InputError, match="config.json: expected a JSON object, got JSONDecodeError"
    ):
        load_tokenizer(tmp_path)
