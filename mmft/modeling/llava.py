"""The model: vision encoder -> projector -> language model, with one `masked_scatter` between them.

Early fusion as in LLaVA (https://arxiv.org/abs/2304.08485, section 4.1): the features of a picture take the places of
its image tokens. A text model is the same class without encoder and projector.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmft.errors import DataError
from mmft.modeling import attention, loss
from mmft.modeling.lora import base_of
from mmft.modeling.sequence import Stretch
from mmft.types import IGNORE_INDEX

PARTS = ("llm", "projector", "vision")


def masked_image_scatter(inputs_embeds: Tensor, input_ids: Tensor, features: Tensor, image_id: int) -> Tensor:
    """Put image features where the ids hold image tokens, in reading order.

    inputs_embeds float[B, T, D], input_ids int64[B, T], features float[N, P, D]  ->  float[B, T, D].
    Does not modify its inputs. Raises `DataError` if input_ids does not hold exactly N * P image tokens, or the widths
    differ: elements would be scattered in flat order, features in pieces.
    """
    if features.shape[-1] != inputs_embeds.shape[-1]:
        raise DataError(
            f"image features of width {features.shape[-1]}, the embeddings have {inputs_embeds.shape[-1]}; the "
            "projector must give the width it was built for"
        )
    is_image = input_ids == image_id
    expected, found = features.shape[0] * features.shape[1], int(is_image.sum())
    if expected != found:
        raise DataError(
            f"{found:,} image tokens in input_ids but {expected:,} image features: collate and the template disagree "
            "on the number of images"
        )
    return inputs_embeds.masked_scatter(is_image[..., None], features.to(inputs_embeds.dtype))


class LlavaModel(nn.Module):
    """A language model that sees, or a plain one where `vision` is None.

    Shapes: input_ids int64[B, T]; pixel_values float[N, 3, H, W]; image_features [N, P, Dv] instead of them where the
    frozen encoder's features are cached; N counts the images of the batch in reading order.
    """

    accepts_loss_kwargs = True  # transformers' Trainer then passes num_items_in_batch, the tokens of the whole step

    def __init__(
        self,
        llm: Any,
        *,
        vision: nn.Module | None = None,
        projector: nn.Module | None = None,
        image_id: int | None = None,
        feature_shape: tuple[int, int] | None = None,
        pixel_shape: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
        layout: Literal["flat", "padded"] = "flat",
    ) -> None:
        super().__init__()
        self.llm, self.vision, self.projector = llm, vision, projector
        self.image_id, self.feature_shape, self.pixel_shape = image_id, feature_shape, pixel_shape
        self.dtype, self.layout = dtype, layout
        self.num_datasets = 1  # of `dataset_ids`
        self.made_by: dict[str, str] = {}  # part -> "projector 'x' of plugin 'y'", of those that plugins build
        self.loss_piece: int | None = None  # the logits of how many tokens are computed at once; None: of all
        self.stretch: Stretch | None = None  # several processes share each row
        self.lockstep = False  # weights are sharded: every rank must run every part, also where a batch has no picture

    @property
    def causal_lm(self) -> Any:
        """transformers' own model, adapters inside, without peft's wrapper."""
        return base_of(self.llm)

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        device: torch.device = next(self.get_input_embeddings().parameters()).device
        return device

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings: transformers' Trainer puts NEFTune's noise on their output, so on no picture feature."""
        embeddings: nn.Module = self.causal_lm.get_input_embeddings()
        return embeddings

    @property
    def vision_trains(self) -> bool:
        """Whether any weight of the encoder is trained."""
        return self.vision is not None and any(p.requires_grad for p in self.vision.parameters())

    def parts(self) -> dict[str, nn.Module]:
        """The parts there are, by name: llm, projector, vision."""
        return {name: module for name in PARTS if (module := getattr(self, name)) is not None}

    def train(self, mode: bool = True) -> "LlavaModel":
        """As torch's, but a frozen encoder stays in eval mode: it is only ever run forward."""
        super().train(mode)
        if self.vision is not None and not self.vision_trains:
            self.vision.eval()
        return self

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in the model's dtype, in training and in chat alike."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            yield

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """float[N, 3, H, W] -> float[N, P, Dv], without gradient where the encoder is frozen."""
        assert self.vision is not None
        with torch.set_grad_enabled(self.vision_trains and torch.is_grad_enabled()):
            features: Tensor = self.vision(pixel_values.to(self.device, self._vision_dtype()))
        return features

    @torch.no_grad()
    def picture_features(self, pixel_values: Tensor) -> Tensor:
        """As `encode_images`, for who asks the model something: an entry of its own, as `forward` and `generate`."""
        with self.autocast():
            return self.encode_images(pixel_values)

    def _vision_dtype(self) -> torch.dtype:
        assert self.vision is not None
        return next((p.dtype for p in self.vision.parameters() if p.is_floating_point()), self.dtype)

    def embed(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, image_features: Tensor | None = None
    ) -> Tensor:
        """float[B, T, D]: word embeddings, with projected picture features at the image tokens."""
        embeddings = self.causal_lm.get_input_embeddings()
        if self.image_id is None or self.projector is None:
            return embeddings(input_ids)  # type: ignore[no-any-return]
        # the image id may lie beyond the embedding matrix, and its row is replaced anyway
        embeds: Tensor = embeddings(input_ids.masked_fill(input_ids == self.image_id, 0))
        if pixel_values is not None:
            image_features = self.encode_images(pixel_values)
        if image_features is None:
            return self._touched_by_projector(embeds)
        projected = self.projector(image_features.to(self.device, self._projector_input_dtype()))
        return masked_image_scatter(embeds, input_ids, projected, self.image_id)

    def _projector_input_dtype(self) -> torch.dtype:
        assert self.projector is not None
        return next((p.dtype for p in self.projector.parameters()), self.dtype)

    def _touched_by_projector(self, embeds: Tensor) -> Tensor:
        """Add a zero-weighted picture where a batch has none, while encoder or projector train.

        Without it a text-only batch gives them no gradient at all: an error in stage 1, where nothing else trains, and
        a hang where several ranks wait for each other's gradients.
        """
        assert self.projector is not None
        trained = [p for p in self.projector.parameters() if p.requires_grad]
        needed = self.training and torch.is_grad_enabled() and (trained or self.vision_trains)
        if not (needed or self.lockstep):
            return embeds
        if (self.vision_trains or self.lockstep) and self.pixel_shape:
            features = self.encode_images(torch.zeros(1, *self.pixel_shape))
        else:
            assert self.feature_shape is not None
            features = torch.zeros(1, *self.feature_shape, device=self.device)
        touched: Tensor = self.projector(features.to(self._projector_input_dtype())).sum()
        return embeds + 0.0 * touched.to(embeds.dtype)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        dataset_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`{"loss"}` with labels, `{"logits"}` float[B, T, V] without.

        The loss is the sum over labelled tokens divided by `num_items_in_batch` (their number in the whole optimizer
        step), or by their number in this batch. Logits are computed where there is a label, and nowhere else.
        `dataset_ids` int64[B, T] asks for "dataset_sums" too: float[2, num_datasets] summed losses and targets of each.
        """
        with self.autocast():
            inputs: dict[str, Any] = {
                "inputs_embeds": self.embed(input_ids, pixel_values, image_features),
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "use_cache": False,  # with a cache, transformers silently lets packed samples see each other
            }
            if position_ids is not None and attention_mask is None:
                inputs |= attention.document_limits(position_ids)
            if labels is None:
                return {"logits": self.causal_lm(**inputs).logits}
            targets = labels[:, 1:]
            sources = None if dataset_ids is None else dataset_ids[:, 1:]
            if self.stretch is not None and self.training and position_ids is not None:
                positions = self.stretch.positions(position_ids)
                inputs |= attention.document_limits(positions) | {"stretch": self.stretch}
                inputs |= {"position_ids": self.stretch.own(positions)}
                inputs |= {"inputs_embeds": self.stretch.own(inputs["inputs_embeds"])}
                targets = self.stretch.own_next(labels, IGNORE_INDEX)
                sources = None if dataset_ids is None else self.stretch.own_next(dataset_ids, 0)
            keep = torch.nonzero((targets != IGNORE_INDEX).any(dim=0)).flatten()
            targets = targets[:, keep]
            losses = self._token_losses(inputs, targets, keep)
            result = {"loss": loss.token_mean(losses, targets, num_items_in_batch)}
            if sources is not None:
                result["dataset_sums"] = loss.dataset_sums(losses, targets, sources[:, keep], self.num_datasets)
            return result

    def _token_losses(self, inputs: dict[str, Any], targets: Tensor, keep: Tensor) -> Tensor:
        """float32[B, K] of the positions `keep` int64[K]; logits are computed for those alone."""
        if self.loss_piece is None or targets.numel() <= self.loss_piece:
            return loss.token_losses(self.causal_lm(**inputs, logits_to_keep=keep).logits, targets)
        hidden = self.causal_lm.base_model(**inputs).last_hidden_state[:, keep]
        return loss.token_losses_in_pieces(self.causal_lm, hidden, targets, self.loss_piece)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """int64[B, new tokens]: transformers' `generate` on the embedded prompt; padding, if any, is on the left.

        Of a prompt whose beginning is in `past_key_values`, an option, only the rest is embedded and run; pictures are
        then those of the rest.
        """
        past = options["past_key_values"].get_seq_length() if options.get("past_key_values") is not None else 0
        with self.autocast(), attention.for_generation(self.causal_lm):
            embeds = self.embed(input_ids[:, past:].to(self.device), pixel_values, image_features)
            embeds = F.pad(embeds, (0, 0, past, 0))  # generate wants the whole prompt, and cuts off what is cached
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            generated: Tensor = self.causal_lm.generate(
                inputs_embeds=embeds, attention_mask=attention_mask.to(self.device), use_cache=True, **options
            )
            return generated
