"""An imported llava-hf model beside the one it came from, run by transformers: the same probes, pixels and logits."""

from pathlib import Path

import torch

from mmft.config import Model
from mmft.convert.parity import ask_source, compare, free, settle, summary, tolerance_for
from mmft.convert.probes import probes
from mmft.convert.results import OurResult
from mmft.data.shape import describe_model
from mmft.hf_llava import load_hf_llava
from mmft.inference import Assistant
from mmft.modeling.build import build_model
from mmft.plugins import Plugins


def prove(
    source: Path,
    model: Model,
    template: str,
    dtype: torch.dtype,
    device: torch.device,
    plugins: Plugins,
    folder: Path,
    out: Path,
) -> str:
    """Write `parity.json` into `folder`, and say what it says. Raises `ParityError` where the two differ.

    Both are asked in the chat template `template`: it is the weights and the pictures that are compared.
    """
    hf, shape = load_hf_llava(str(source), dtype=dtype, device=device)
    bound = plugins.chat_templates.get(template).for_tokenizer(shape.tokenizer.hf)
    with probes(pictures=True) as asked:
        answers = ask_source(OurResult(Assistant(hf, shape, bound)), asked)
        del hf
        free()
        ours = describe_model(model, plugins, folder)
        built = build_model(
            model,
            plugins,
            info=ours.vision,
            image_id=ours.tokenizer.image_id,
            dtype=dtype,
            device=device,
            weights=folder,
        )
        result = OurResult(Assistant(built.eval(), ours, bound))
        report = compare(answers, result, ours.tokenizer, dtype=dtype, tolerance=tolerance_for(dtype, "none"))
    settle(report, folder, out)
    numbers = summary(report)
    return (
        f"verified in {report.dtype} against transformers: {numbers['probes']} probes, logits differ by at most "
        f"{numbers['relative']:.1e} of their size"
    )
