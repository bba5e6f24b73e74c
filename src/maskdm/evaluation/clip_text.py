"""How far images are from a text, as a CLIP network sees both (arXiv 2103.00020): a local folder of the Transformers library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from maskdm.errors import UserError, shorten
from maskdm.evaluation.preparation import Preparation
from maskdm.evaluation.transformers_network import (
    LOCAL,
    first_line,
    library_for,
    preparation_of,
    quietly,
    read_json,
    read_model,
    refuse_missing,
)


@dataclass(frozen=True)
class Prompt:
    """A text as a network sees it, and what images are compared with it by."""

    model: Any  # a transformers.CLIPModel; the library is imported only when it is used
    preparation: Preparation
    embedding: Float[Tensor, "1 dimensions"]

    def distance(self, images: Float[Tensor, "batch _ _ _"]) -> Float[Tensor, " batch"]:
        """1 - the cosine of the angle between image and text, 0..2, of images in -1..1; differentiable, in fp32 under autocast too."""
        with torch.autocast(images.device.type, enabled=False):
            pixels = self.preparation.differentiable((images.float() + 1) * 127.5)
            seen = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
            return 1 - F.cosine_similarity(seen, self.embedding)


def read_prompt(folder: Path, text: str, device: torch.device) -> Prompt:
    """A text through the CLIP network of a folder: config.json, preprocessor_config.json, model.safetensors and its tokenizer.

    Nothing is fetched. UserError for a folder that is none, is of another network, or lacks weights or tokenizer, and for a text that is
    empty or longer than the network reads.
    """
    if not folder.is_dir():
        raise UserError(f"--clip {folder} is no folder; give one as save_pretrained of a CLIPModel and its processor writes it")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise UserError(f"--clip {folder} holds a network of the type {kind}; text needs both towers of a CLIPModel")
    library_for(folder)
    tokens = _tokens(folder, text)
    preparation = preparation_of(folder)
    model, missing = read_model(folder, lambda library, config: (library.CLIPModel, config))
    refuse_missing(folder, missing)
    about = model.config.text_config
    if tokens.shape[1] > about.max_position_embeddings:
        raise UserError(f"--prompt has {tokens.shape[1]} tokens, and the network reads {about.max_position_embeddings}; shorten it")
    if int(tokens.max()) >= about.vocab_size:
        raise UserError(f"the tokenizer in {folder} is another network's: it knows {int(tokens.max()) + 1} tokens or more")
    model = model.to(device)
    with torch.no_grad():
        embedding = model.text_projection(model.text_model(input_ids=tokens.to(device)).pooler_output)
    return Prompt(model, preparation, embedding)


def _tokens(folder: Path, text: str) -> Tensor:
    """Numbers of a text's tokens [1, tokens], begin and end included."""
    if not text.strip():
        raise UserError("--prompt is empty; say what the images are to show, such as 'a red flower'")
    known = {path.name for path in folder.iterdir()}
    if "tokenizer.json" not in known and not {"vocab.json", "merges.txt"} <= known:
        raise UserError(f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); copy it from where the network is from")
    try:
        with quietly():
            tokenizer: Any = library_for(folder).AutoTokenizer.from_pretrained(folder, **LOCAL)
            found: Tensor = tokenizer(text.strip(), return_tensors="pt")["input_ids"]
    except Exception as error:  # the library raises every kind of error for what stands in a folder
        raise UserError(f"the tokenizer in {folder} fails on '{shorten(text, 40)}': {first_line(error)}") from error
    return found
