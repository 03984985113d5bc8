"""A short run of the demo: the model learns, and what it learned sits in the experts."""

import time

import moe_full_finetune as recipe
from omegaconf import OmegaConf
from python_stdlib.prepare import prepare
from python_stdlib.report import evaluate, experts_silenced, read_documents
from tokenizers import Tokenizer

from moe_builders.hub import load_hf_model
from moe_builders.metrics import dead_experts
from moe_builders.training.config import find_config, load_config

# the whole demo is held to 0.82 and 0.3; this run sees an eighth of its tokens
MOST_OF_UNIGRAM, RISE_WITHOUT_EXPERTS = 0.95, 0.3  # measured: 0.914, 0.67


def test_a_short_run_learns_for_the_right_reason(tmp_path):
    started = time.perf_counter()
    prepare(tmp_path / "data", vocab_size=1024, max_bytes=1_500_000)
    data = tmp_path / "data"
    overrides = [
        f"base_model={data / 'base'}", f"output_dir={tmp_path / 'run'}", "max_seq_len=128",
        f"dataset.data_files={data / 'train.jsonl'}", "dataset_val=null", "batch_size=8",
        "max_steps=150", "lr_scheduler.num_warmup_steps=10", "optimizer.lr=3e-3",
        "router_losses.load_balancing_coef=0.05",
    ]  # fmt: skip
    trained = recipe.main(load_config(find_config("qwen3_moe/python_stdlib"), overrides))
    tokenizer = Tokenizer.from_file(str(data / "base/tokenizer.json"))
    documents = read_documents(data, tokenizer, max_tokens=20_000)
    tokens = [document.tokens for document in documents]
    model, _ = load_hf_model(trained.model_folder)
    tuned = evaluate(model, tokens, 128)
    unigram = sum(d.unigram_nats for d in documents) / tuned.tokens
    with experts_silenced(model):
        silenced = evaluate(model, tokens, 128)
    loss, without = tuned.nats / tuned.tokens, silenced.nats / silenced.tokens
    print(f"unigram {unigram:.3f}, tuned {loss:.3f}, silenced {without:.3f}, "
          f"{time.perf_counter() - started:.0f} s")  # fmt: skip
    print({name: counts.tolist() for name, counts in tuned.load.items()})
    assert loss <= MOST_OF_UNIGRAM * unigram
    assert without >= loss + RISE_WITHOUT_EXPERTS
    assert all(dead_experts(counts) == 0 for counts in tuned.load.values())
    assert OmegaConf.load(tmp_path / "run/torchtune_config.yaml").max_steps == 150
