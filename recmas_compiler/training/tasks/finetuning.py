"""How the answer agent's own backbone learns instead of links, to compare with.

`lora` trains low-rank additions to its matrices (arXiv 2106.09685), `sft` all of its weights. Both
end as a backbone of their own, a folder that a spec can name.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

import torch
from safetensors.torch import save_file
from torch import nn

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.lowering.reference import module_name
from recmas_compiler.spec.schema.train import LoraSection, SftSection, TrainSection
from recmas_runtime.core.errors import fail

MethodName = Literal["lora", "sft"]

ADAPTER: Final = "adapter"
MODEL: Final = "model"


class Learner(Protocol):
    """Weights of a backbone that learn."""

    @property
    def weights(self) -> nn.ParameterDict:
        """What learns, by name; the backbone uses these very tensors."""

    @property
    def settings(self) -> LoraSection | SftSection:
        """The method's own settings."""

    def save(self, folder: Path) -> None:
        """Write what was learned into a folder; nothing can be learned after this."""


class FullLearner:
    """All weights of a backbone.

    Args:
        backbone: Changed in place.
        section: How to train.
    """

    def __init__(self, backbone: TorchBackbone, section: TrainSection) -> None:
        self.settings = section.sft
        self._backbone = backbone
        for weight in backbone.model.parameters():
            weight.data = weight.data.clone()  # it may be a read-only map of its file
            weight.requires_grad_(True)
        self.weights = _trainable(backbone.model)

    def save(self, folder: Path) -> None:
        """Write the backbone into `folder/model`."""
        _save_model(self._backbone, self._backbone.model, folder)


class LoraLearner:
    """Low-rank additions to every matrix of a backbone but its embeddings and its head.

    Args:
        backbone: Changed in place.
        section: How to train; the additions are drawn by its seed.

    Raises:
        RecmasError: RM201 without peft.
    """

    def __init__(self, backbone: TorchBackbone, section: TrainSection) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise fail(
                "RM201",
                "--method lora needs the package peft, which is not installed",
                hint='Install it with `pip install "recmas[train]"`.',
            ) from error
        self.settings = section.lora
        self._backbone = backbone
        config = LoraConfig(
            r=section.lora.rank,
            lora_alpha=section.lora.alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(section.seed)
            self._adapted = get_peft_model(backbone.model, config)
        self.weights = _trainable(backbone.model)
        for weight in self.weights.values():
            weight.data = weight.data.float()  # they learn, so they are no bfloat16 numbers

    def save(self, folder: Path) -> None:
        """Write the additions into `folder/adapter`, as peft does, and the sum into `model`.

        The sum is float32: in bfloat16, small additions would be lost in its rounding.
        """
        from peft import get_peft_model_state_dict

        place = folder / ADAPTER
        place.mkdir(parents=True, exist_ok=True)
        learned = get_peft_model_state_dict(self._adapted, save_embedding_layers=False)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in learned.items()}
        staged = place / ".adapter_model.safetensors.writing"
        save_file(tensors, staged, metadata={"format": "pt"})
        staged.replace(place / "adapter_model.safetensors")
        self._adapted.peft_config["default"].save_pretrained(place)
        adapted = self._adapted.to("cpu", torch.float32)
        _save_model(self._backbone, adapted.merge_and_unload(), folder)


METHODS: Final = MappingProxyType[MethodName, Callable[[TorchBackbone, TrainSection], Learner]](
    {"lora": LoraLearner, "sft": FullLearner}
)


def _trainable(model: nn.Module) -> nn.ParameterDict:
    """Return the weights that have gradients, each once, under names that modules may have."""
    found = {name: w for name, w in model.named_parameters() if w.requires_grad}
    return nn.ParameterDict({module_name(name): weight for name, weight in found.items()})


def _save_model(backbone: TorchBackbone, model: Any, folder: Path) -> None:
    """Write model, tokenizer and chat template; the folder is complete or not there."""
    place, staged = folder / MODEL, folder / f".{MODEL}.writing"
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(staged)
    backbone.tokenizer.save_pretrained(staged)
    shutil.rmtree(place, ignore_errors=True)
    staged.rename(place)
