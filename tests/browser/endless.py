"""A model whose answers go on until the limit or until somebody stops them, slowly enough to be stopped."""

from pathlib import Path

import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration

from llava_app.checkpoints import Card, write_card
from llava_app.processors import make_processor
from tests.fixtures_model import byte_tokenizer, tiny_config


def write_endless_model(folder: Path) -> None:
    """Random weights under a head that knows sixteen letters: a random direction or its opposite for each.

    One of them is always far likelier than the end token, which has none. 192 layers take milliseconds for a token.
    """
    config = tiny_config()
    config.text_config.num_hidden_layers = 192
    config.text_config.max_position_embeddings = 4096
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        directions = 10 * torch.randn(8, config.text_config.hidden_size)
    tokenizer = byte_tokenizer()
    letters = tokenizer("abcdefghijklmnop", add_special_tokens=False).input_ids
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[letters] = torch.cat([directions, -directions])
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.save_pretrained(folder)
    make_processor(config, tokenizer, image_mode="pad", template_name="vicuna_v1").save_pretrained(folder)
    about = "It writes letters until it is stopped."
    write_card(folder, Card("Endless", str(folder), "run", "instruct", "vicuna_v1", "pad", about=about))
