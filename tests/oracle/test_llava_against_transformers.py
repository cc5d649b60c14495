"""Our model against transformers' `LlavaForConditionalGeneration` made of the same parts."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from mmft.config import LLM, Model, Vision, use
from mmft.data.collate import Collator, flat_batch, padded_batch
from mmft.data.shape import describe_model
from mmft.data.tokenize import tokenize
from mmft.modeling.attention import for_generation
from mmft.modeling.build import build_model
from mmft.testing import tiny_llm, tiny_vision
from mmft.types import IGNORE_INDEX, Conversation, Image, Message, Text

# Measured over both encoders (float32, CPU, logits of standard deviation 0.11): padded logits 0.0, packed logits
# 1.2e-7, losses of about 6 6.2e-7. A leaking sample, a wrong layer or a CLS token left in moves logits far more.
TOLERANCE = 2e-6
ENCODERS = {
    "clip": {"strategy": "default", "pad_to_square": True},
    "siglip": {"strategy": "full", "pad_to_square": False},
}


@pytest.fixture(scope="module", params=sorted(ENCODERS))
def pair(request, tmp_path_factory, plugins):
    """(our model, transformers' model, shape) with equal weights."""
    kind = request.param
    root = tmp_path_factory.mktemp(kind)
    llm, encoder = tiny_llm(root / "llm"), tiny_vision(root / "encoder", kind)
    config = Model(
        llm=LLM(path=str(llm)),
        vision=Vision(
            encoder=use(kind, path=str(encoder), select_layer=-2, pad_to_square=ENCODERS[kind]["pad_to_square"]),
            projector=use("mlp2x_gelu"),
        ),
    )
    torch.manual_seed(1)
    shape = describe_model(config, plugins)
    ours = build_model(
        config,
        plugins,
        info=shape.vision,
        image_id=shape.tokenizer.image_id,
        dtype=torch.float32,
        device=torch.device("cpu"),
    ).eval()
    return ours, transformers_twin(ours, llm, encoder, ENCODERS[kind]["strategy"]), shape


def transformers_twin(ours, llm, encoder, strategy):
    text, vision = AutoModelForCausalLM.from_pretrained(llm), AutoModel.from_pretrained(encoder)
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text.config,
        image_token_index=text.config.vocab_size - 1,  # the last row of the embeddings, in no test's text
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu",
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.model.vision_tower.load_state_dict(vision.state_dict())
    theirs.model.language_model.load_state_dict(text.model.state_dict())
    theirs.lm_head.load_state_dict(text.lm_head.state_dict())
    weights = ours.projector.state_dict()
    names = {"0": "linear_1", "2": "linear_2"}
    renamed = {f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in weights.items()}
    theirs.model.multi_modal_projector.load_state_dict(renamed)
    return theirs


@pytest.fixture(scope="module")
def samples(pair, tmp_path_factory, plugins):
    """A picture in front, two pictures inside the text, and none."""
    from PIL import Image as PILImage

    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    paths = []
    for i, size in enumerate(((40, 30), (17, 60), (33, 33))):
        path = folder / f"{i}.png"
        PILImage.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        paths.append(path)
    conversations = (
        _ask([Image(paths[0]), Text("\nWhat is it?")], "A cat."),
        _ask([Text("Compare "), Image(paths[1]), Text(" with "), Image(paths[2])], "They differ in colour."),
        _ask([Text("Say 123")], "123"),
    )
    template = plugins.chat_templates.get("chatml")
    tokenizer = pair[2].tokenizer
    return [tokenize(template.render(conversation), tokenizer) for conversation in conversations]


def _ask(parts, answer):
    return Conversation((Message("user", tuple(parts)), Message("assistant", (Text(answer),))))


def theirs_on(theirs, shape, batch, **options):
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == shape.tokenizer.image_id, theirs.config.image_token_id)
    rest = {key: batch[key] for key in ("labels", "attention_mask", "position_ids", "pixel_values") if key in batch}
    with torch.no_grad():
        return theirs(input_ids=ids, use_cache=False, **rest, **options)


def collated(layout, shape, samples):
    return Collator(layout, pad_id=0, transform=shape.vision.transform)(samples)


def test_logits_of_a_padded_batch_equal_transformers(pair, samples):
    ours, theirs, shape = pair
    batch = collated("padded", shape, samples)
    expected = theirs_on(theirs, shape, batch).logits
    with torch.no_grad(), for_generation(ours.causal_lm):  # SDPA, as a model without varlen attention has it
        got = ours(**{k: v for k, v in batch.items() if k != "labels"})["logits"]
    real = batch["attention_mask"].bool()
    assert (got - expected)[real].abs().max() < TOLERANCE


def test_loss_of_a_padded_batch_equals_transformers(pair, samples):
    ours, theirs, shape = pair
    batch = collated("padded", shape, samples)
    with torch.no_grad(), for_generation(ours.causal_lm):
        assert abs(ours(**batch)["loss"] - theirs_on(theirs, shape, batch).loss) < TOLERANCE


def test_packed_samples_have_the_logits_each_has_alone_in_transformers(pair, samples):
    ours, theirs, shape = pair
    batch = collated("flat", shape, samples)
    with torch.no_grad():
        got = ours(**{k: v for k, v in batch.items() if k != "labels"})["logits"][0]
    start = 0
    for sample in samples:
        alone = collated("padded", shape, [sample])
        expected = theirs_on(theirs, shape, alone).logits[0]
        assert (got[start : start + len(sample)] - expected).abs().max() < TOLERANCE
        start += len(sample)


def test_packed_loss_is_the_token_mean_over_the_separate_samples(pair, samples):
    ours, theirs, shape = pair
    total = tokens = 0.0
    for sample in samples:
        alone = collated("padded", shape, [sample])
        labelled = int((alone["labels"] != IGNORE_INDEX).sum())
        total += float(theirs_on(theirs, shape, alone).loss) * labelled
        tokens += labelled
    with torch.no_grad():
        loss = ours(**collated("flat", shape, samples))["loss"]
    assert abs(float(loss) - total / tokens) < TOLERANCE


def test_gradients_of_the_projector_equal_transformers(pair, samples):
    ours, theirs, shape = pair
    batch = collated("padded", shape, samples)
    ours.zero_grad()
    with for_generation(ours.causal_lm):
        ours(**batch)["loss"].backward()
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == shape.tokenizer.image_id, theirs.config.image_token_id)
    theirs.zero_grad()
    theirs(**{**batch, "input_ids": ids}, use_cache=False).loss.backward()
    expected = theirs.model.multi_modal_projector.linear_1.weight.grad
    assert torch.allclose(ours.projector[0].weight.grad, expected, rtol=1e-4, atol=1e-8)


def test_generation_equals_transformers(pair, samples):
    ours, theirs, shape = pair
    sample = samples[0]
    prompt = sample.input_ids[: int(np.argmax(sample.loss_mask))]
    ids = torch.from_numpy(prompt.astype("int64"))[None]
    pixels = collated("padded", shape, [sample])["pixel_values"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    got = ours.generate(ids, pixel_values=pixels, **options)
    their_ids = ids.masked_fill(ids == shape.tokenizer.image_id, theirs.config.image_token_id)
    expected = theirs.generate(their_ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), **options)
    assert got.tolist() == expected[:, ids.shape[1] :].tolist()


def test_flat_and_padded_layouts_hold_the_same_tokens(samples):
    flat, padded = flat_batch(samples), padded_batch(samples, 0)
    assert flat["input_ids"].numel() == int(padded["attention_mask"].sum())
    assert (flat["labels"] != IGNORE_INDEX).sum() == (padded["labels"] != IGNORE_INDEX).sum()
