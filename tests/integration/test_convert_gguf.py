"""`mmft convert gguf`: trained models of many families as GGUF, run by llama.cpp itself, with pictures.

Skipped without llama-cpp-python, which `make test` compiles.
"""

import json

import convert_models
import pytest
import torch
from click.testing import CliRunner
from convert_models import FAMILIES, trained

from mmft.convert.gguf import export as gguf_export
from mmft.convert.gguf.export import Wish, export, find_pair, verify
from mmft.convert.gguf.judge import judge
from mmft.convert.gguf.run import LlamaCppResult, is_there
from mmft.convert.parity import ParityError
from mmft.convert.parts import load_parts
from mmft.errors import CheckpointError, ModelError
from mmft.inference import user_message
from mmft.types import Conversation

CPU = torch.device("cpu")
needs_llama_cpp = pytest.mark.skipif(
    not is_there(), reason="llama-cpp-python is not installed; `make .venv/.llama_cpp` compiles it"
)
PADDED = {"encoder": "siglip", "encoder_options": {"pad_to_square": True}}
# SigLIP, because llama.cpp 0.5.0 puts the CLS token of others in the wrong place. Relative difference of the logits,
# measured: 4e-3 over all families, of which keys and values in 16 bits are the most. An adapter left out gives 0.1.
TOLERANCE = 1e-2


@pytest.fixture
def family(monkeypatch):
    """A family that `convert_models` does not have, or with other options."""

    def add(name, **options):
        monkeypatch.setitem(FAMILIES, name, options)
        return name

    return add


@needs_llama_cpp
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "gemma", "gemma3_text"])
def test_llama_cpp_gives_the_trained_models_answers_about_pictures(name, plugins, tmp_path, family):
    if name == "gemma3_text":
        gemma = {"tie_word_embeddings": True, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
        family(name, **gemma, num_hidden_layers=7)  # the sixth sees everything
    folder = trained(tmp_path, plugins, family=name, **PADDED)
    report = export(folder, tmp_path / "out", plugins, Wish("f16"))
    assert report.verified
    assert len(report.outcomes) == 11
    assert max(outcome.relative for outcome in report.outcomes) < TOLERANCE
    assert sum(outcome.flips for outcome in report.outcomes) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["Modelfile", "mmproj-f16.gguf", "model-f16.gguf", "parity.json"]
    assert json.loads((tmp_path / "out" / "parity.json").read_text("utf-8"))["pictures"][0]["relative"] > 0


@needs_llama_cpp
def test_layers_that_llama_cpp_knows_in_one_order_are_written_in_it(plugins, tmp_path, family):
    family("smollm3", tie_word_embeddings=True, num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])
    family("gemma2", tie_word_embeddings=True, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=30.0)
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    family("llama", rope_parameters=scaled)
    for name in ("smollm3", "gemma2", "llama"):
        (tmp_path / name).mkdir()
        folder = trained(tmp_path / name, plugins, family=name, encoder=None)
        report = export(folder, tmp_path / name / "out", plugins, Wish("f32"))
        assert max(outcome.relative for outcome in report.outcomes) < TOLERANCE


@needs_llama_cpp
@pytest.mark.parametrize(("quant", "least", "most"), [("q8_0", 5e-3, 0.1), ("q4_0", 0.1, 0.8)])
def test_quantised_weights_load_and_their_rounding_is_told(quant, least, most, plugins, tmp_path):
    folder = trained(tmp_path, plugins, family="qwen2", encoder=None)
    report = export(folder, tmp_path / "out", plugins, Wish(quant))
    assert least < max(outcome.relative for outcome in report.outcomes) < most
    assert all(outcome.same_prompt for outcome in report.outcomes)


@needs_llama_cpp
def test_quantised_weights_of_a_model_that_sees_tell_both_sets_of_numbers(plugins, tmp_path):
    folder = trained(tmp_path, plugins, **PADDED)
    report = export(folder, tmp_path / "out", plugins, Wish("q4_0"))
    told = json.loads((tmp_path / "out" / "parity.json").read_text("utf-8"))
    assert report.verified and told["verified"] and told["proof"]["verified"]
    assert (told["dtype"], told["tolerance"]) == ("q4_0", 0.8)
    assert (told["proof"]["dtype"], told["proof"]["tolerance"]) == ("f16", 0.02)
    assert len(told["outcomes"]) == len(told["proof"]["outcomes"]) == 11
    most = {
        name: max(one["relative"] for one in part["outcomes"])
        for name, part in (("q4_0", told), ("f16", told["proof"]))
    }
    assert most["f16"] < TOLERANCE < 0.1 < most["q4_0"]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["Modelfile", "mmproj-f16.gguf", "model-q4_0.gguf", "parity.json"]  # nothing of the proof


@needs_llama_cpp
def test_an_encoder_with_cls_is_refused_at_four_bits_too(plugins, tmp_path):
    folder = trained(tmp_path, plugins, encoder="clip", encoder_options={"pad_to_square": True})
    try:
        report = export(folder, tmp_path / "out", plugins, Wish("q4_0"))
    except ParityError as error:
        assert "in f16, before q4_0 is written: a picture: the logits differ" in str(error)
        assert "CLS token's place" in str(error)
        assert not (tmp_path / "out").exists()
    else:  # a llama.cpp where it is mended
        assert max(outcome.relative for outcome in report.proof.outcomes) < TOLERANCE


@needs_llama_cpp
def test_a_model_whose_adapter_was_left_out_is_refused_at_four_bits_too(plugins, tmp_path, monkeypatch):
    """The adapter moves the logits by less than 4 bits do, so only the proof before can see it."""
    monkeypatch.setattr(convert_models, "shake", lambda built: shaken(built, 0.01))
    folder = trained(tmp_path, plugins, encoder=None)
    (tmp_path / "b").mkdir()
    base = trained(tmp_path / "b", plugins, encoder=None, llm={})
    export(folder, tmp_path / "out", plugins, Wish("q4_0"))
    export(base, tmp_path / "base", plugins, Wish("q4_0"))
    assert judge(folder, tmp_path / "base", plugins, Wish("q4_0"), ()).verified  # by the numbers of 4 bits alone
    without_proof(tmp_path / "base" / "parity.json")
    assert verify(tmp_path / "out", folder, plugins, device=CPU).verified
    with pytest.raises(ParityError, match=r"does not give what .* gives: model-q4_0\.gguf: .* other weights"):
        verify(tmp_path / "base", folder, plugins, device=CPU)
    told = json.loads((tmp_path / "base" / "parity.json").read_text("utf-8"))
    assert told["verified"] is False  # what was there had no proof, so it counted for nothing
    assert told["proof"]["verified"] is True  # that of the model, which can be written; these files are not it
    monkeypatch.setattr(gguf_export, "load_parts", lambda _, *args, **options: load_parts(base, *args, **options))
    with pytest.raises(ParityError, match="in f16, before q4_0 is written: a question: the logits differ"):
        export(folder, tmp_path / "bad", plugins, Wish("q4_0"))


@needs_llama_cpp
def test_weights_beyond_sixteen_bits_are_proved_in_thirty_two(plugins, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = trained(tmp_path, plugins, encoder=None, rows=8)
    weights = load_file(tmp_path / "llm" / "model.safetensors")
    weights["model.embed_tokens.weight"][-1] = 1e5  # of a row without a token
    save_file(weights, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="beyond the range of 16-bit floats; choose --quant bf16"):
        export(folder, tmp_path / "half", plugins, Wish("f16"))
    for quant in ("bf16", "q8_0"):
        report = export(folder, tmp_path / quant, plugins, Wish(quant))
        assert (report.dtype, report.proof.dtype, report.proof.tolerance) == (quant, "f32", 0.02)
        assert report.note.startswith(f"proved in f32 before {quant} was written: ")


def without_proof(parity):
    """As it was written before there was one."""
    content = json.loads(parity.read_text("utf-8"))
    del content["proof"]
    parity.write_text(json.dumps(content), "utf-8")


@torch.no_grad()
def shaken(built, size):
    for parameter in built.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * size)


@needs_llama_cpp
@pytest.mark.parametrize("dummy_prefix", [True, False], ids=["as llama 2", "as gemma"])
def test_sentencepiece_tokenizers_give_the_same_ids(dummy_prefix, plugins, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_models, "tiny_tokenizer", lambda folder, **_: sentencepiece(folder, dummy_prefix))
    folder = trained(tmp_path, plugins, template="vicuna", **PADDED)
    report = export(folder, tmp_path / "out", plugins, Wish("f16"))
    assert all(outcome.same_prompt for outcome in report.outcomes)
    assert {outcome.probe for outcome in report.outcomes} >= {"unicode", "white space", "two pictures"}


def sentencepiece(folder, dummy_prefix):
    """A BPE tokenizer as transformers makes of a sentencepiece model: bytes for what is unknown, ▁ for spaces."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from mmft.testing import CORPUS

    special = ["<unk>", "<s>", "</s>"]
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never")  # no piece has a space inside
    ascii_only = [text.encode("ascii", "ignore").decode() for text in CORPUS]
    core.train_from_iterator(ascii_only, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    if dummy_prefix:
        core.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False)
    else:
        core.normalizer, core.pre_tokenizer = normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "isolated")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    content = json.loads(core.to_str())
    pieces = [piece for piece, _ in sorted(content["model"]["vocab"].items(), key=lambda item: item[1])]
    pieces[3:3] = [f"<0x{byte:02X}>" for byte in range(256)]
    content["model"]["vocab"] = {piece: row for row, piece in enumerate(pieces)}
    hf = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    hf.save_pretrained(folder)
    return folder


@needs_llama_cpp
@pytest.mark.parametrize("encoder", ["clip", "dinov2", "vit"])
def test_an_encoder_with_cls_is_written_right_and_the_gate_sees_what_llama_cpp_makes_of_it(encoder, plugins, tmp_path):
    """The features are those of the encoder in the order that llama.cpp really runs, so every tensor is in place."""
    folder = trained(tmp_path, plugins, encoder=encoder, encoder_options={"pad_to_square": True})
    try:
        export(folder, tmp_path / "out", plugins, Wish("f32"))
    except ParityError as error:
        assert "CLS token's place" in str(error)
        assert "choose an encoder without CLS" in str(error)
        assert not (tmp_path / "out").exists()
    else:
        return  # a llama.cpp where it is mended
    place = tmp_path / ".out.unproved"
    assert json.loads((place / "parity.json").read_text("utf-8"))["verified"] is False
    parts = load_parts(folder, plugins, dtype="fp32", device=CPU)
    theirs, pixels = llama_cpp_features(place, parts, tmp_path)
    ours = in_their_order(parts, pixels)
    assert (theirs - ours).norm() / ours.norm() < 2e-3  # measured: 5e-4; GELU is rounded to 16 bits there


def llama_cpp_features(place, parts, tmp_path):
    """float32[P, D] of one picture, and its pixels."""
    import ctypes

    import numpy as np
    from llama_cpp import mtmd_cpp as mtmd
    from PIL import Image

    Image.effect_noise((28, 28), 90).convert("RGB").save(tmp_path / "noise.png")
    asked = Conversation((user_message("What?", [tmp_path / "noise.png"]),))
    transform, width = parts.shape.vision.transform, parts.llm.config.hidden_size
    with (
        LlamaCppResult(*find_pair(place), parts.shape.tokenizer, transform, longest=200) as result,
        result._chunks(asked) as chunks,
    ):
        found = [mtmd.mtmd_input_chunks_get(chunks, k) for k in range(mtmd.mtmd_input_chunks_size(chunks))]
        kinds = [mtmd.mtmd_input_chunk_get_type(chunk) for chunk in found]
        picture = found[kinds.index(mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE)]
        assert mtmd.mtmd_encode_chunk(result._sight, picture) == 0
        count = mtmd.mtmd_input_chunk_get_n_tokens(picture)
        values = ctypes.cast(mtmd.mtmd_get_output_embd(result._sight), ctypes.POINTER(ctypes.c_float))
        features = np.ctypeslib.as_array(values, shape=(count, width)).copy()
        return torch.from_numpy(features), result.inputs(asked)[1]


@torch.no_grad()
def in_their_order(parts, pixels):
    """What llama.cpp 0.5.0 computes: CLS behind the patches, positions in that order, the first patch left out."""
    encoder = parts.vision
    kept = {}

    def turn(module, inputs, output):
        """The embeddings, less their positions, in the other order."""
        positions = getattr(module, "position_embeddings", None)
        table = positions if positions is not None else module.position_embedding.weight[None]
        bare = output - table
        kept["made"] = torch.cat([bare[:, 1:], bare[:, :1]], 1) + table
        return kept["made"]

    hook = encoder.model.embeddings.register_forward_hook(turn)
    try:
        states = encoder.model(pixels, output_hidden_states=[encoder.layer]).hidden_states[encoder.layer]
    finally:
        hook.remove()
    return parts.projector(states[:, 1:])[0]


@needs_llama_cpp
def test_a_damaged_file_is_told_and_an_old_result_can_be_verified_again(plugins, tmp_path):
    folder = trained(tmp_path, plugins, encoder=None)
    out = tmp_path / "out"
    export(folder, out, plugins, Wish("f16"))
    (tmp_path / "b").mkdir()
    other = trained(tmp_path / "b", plugins, encoder=None, llm={})  # the same base without the adapter
    assert verify(out, folder, plugins, device=CPU).verified
    with pytest.raises(ParityError, match=r"does not give what .* gives: .*the logits differ by.*left as it is"):
        verify(out, other, plugins, device=CPU)
    assert json.loads((out / "parity.json").read_text("utf-8"))["verified"] is True
    (out / "model-f16.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 and nothing else")
    with pytest.raises(ModelError, match=r"model-f16\.gguf: llama\.cpp does not load it"):
        verify(out, folder, plugins, device=CPU)


def test_without_llama_cpp_the_result_says_that_it_is_not_verified_and_how_to(plugins, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "is_there", lambda: False)
    folder = trained(tmp_path, plugins, encoder=None)
    report = export(folder, tmp_path / "out", plugins, Wish("f16"))
    written = json.loads((tmp_path / "out" / "parity.json").read_text("utf-8"))
    assert report.verified is written["verified"] is False
    assert written["note"] == "llama-cpp-python is not installed, so nothing was compared"
    command = f"mmft convert gguf {folder} {tmp_path / 'out'} --quant f16 --overwrite"
    assert written["command"] == f"pip install llama-cpp-python && {command}"
    with pytest.raises(ModelError, match="llama-cpp-python is not installed"):
        verify(tmp_path / "out", folder, plugins, device=CPU)


def test_without_llama_cpp_an_encoder_with_cls_is_refused(plugins, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "is_there", lambda: False)
    folder = trained(tmp_path, plugins, encoder="clip", encoder_options={"pad_to_square": True})
    with pytest.raises(ModelError, match=r"CLS token.*pip install llama-cpp-python"):
        export(folder, tmp_path / "out", plugins, Wish("f16"))
    assert not (tmp_path / "out").exists()


def test_what_has_no_place_in_llama_cpp_is_refused_before_anything_is_written(plugins, tmp_path):
    from mmft.cli import cli

    folder = trained(tmp_path, plugins, projector="linear")
    for options, told in ((["--quant", "q4_k_m"], "llama-quantize"), ([], "train with projector 'mlp2x_gelu'")):
        result = CliRunner().invoke(cli, ["convert", "gguf", str(folder), str(tmp_path / "out"), *options])
        assert result.exit_code != 0
        assert told in str(result.exception)
    assert not list(tmp_path.glob("*out*"))


def test_a_place_below_a_file_is_one_line(plugins, tmp_path):
    folder = trained(tmp_path, plugins, encoder=None)
    (tmp_path / "file").write_text("here")
    with pytest.raises(CheckpointError, match=r"file/a/out: .*file is no folder; choose"):
        export(folder, tmp_path / "file" / "a" / "out", plugins, Wish("q4_0"))
    assert (tmp_path / "file").read_text() == "here"
