"""Numbers that are not finite, and parts that learn nothing: found at once, and told with what a person needs to act.

Before a failure this costs one number read a step. After it, the failing micro-batch is run once more with hooks on
every module, to name the first one whose output, or whose gradient, is not finite.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mmft.data.collate import ORIGINS
from mmft.errors import TrainingError
from mmft.modeling.checkpoint import MANIFEST, checkpoints
from mmft.modeling.llava import LlavaModel
from mmft.ranks import all_raise, gathered
from mmft.types import IGNORE_INDEX

log = logging.getLogger("mmft")
ROWS_SHOWN = 8
SEARCH_STEPS = 40  # a loss scaler that starts at 65,536 and halves is below any use by then


class Guard:
    """Watches one run: `begin` with the micro-batches of a step, `saw` each loss, `check` before the optimizer steps.

    `scaled` says that a loss scaler looks for its scale (fp16): gradients that overflow are then skipped, not wrong.
    Of several ranks all come to `check` with the same gradient norm: they search together, and the first one tells.
    """

    def __init__(self, model: LlavaModel, folder: Path, *, scaled: bool = False) -> None:
        self.model, self.folder, self.scaled = model, folder, scaled
        self.first_gradients = FirstGradients(model)
        self.batches: Sequence[Mapping[str, Any]] = ()
        self.losses: list[Tensor] = []
        self.overflows = 0

    def begin(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """The micro-batches of the next optimizer step. They are held anyway; no copy is made."""
        self.batches, self.losses = batches, []

    def saw(self, loss: Tensor) -> None:
        """The loss of the next micro-batch."""
        self.losses.append(loss.detach())

    def check_losses(self, step: int, agree: Callable[[int], int], *, forward: Callable[..., Any]) -> None:
        """As `check`, before the last backward of a step: for DeepSpeed, which steps in it. All ranks come here.

        `agree` gives every rank the largest number any of them has.
        """
        loss = float(torch.stack(self.losses).sum())
        if agree(int(not _finite(loss))):
            value = next(other for other in gathered(loss) if not _finite(other))
            self._refuse(step, f"the loss is {value}", forward, all_know=True)

    def check(
        self,
        norm: Tensor | float | None,
        step: int,
        *,
        forward: Callable[..., Any] | None = None,
        together: bool = False,
    ) -> None:
        """Before the optimizer steps. Raises `TrainingError` that names step, records and module.

        `forward` runs the model for the search, None where it cannot be run again (DeepSpeed has stepped already);
        `together`: it is run by all ranks or by none.
        """
        loss_value = float(torch.stack(self.losses).sum()) if self.losses else 0.0
        norm_value = 0.0 if norm is None else float(getattr(norm, "full_tensor", lambda: norm)())  # FSDP's is sharded
        overflowed = not _finite(norm_value)
        if overflowed:  # all ranks know that, and must agree whether it was somebody's loss
            loss_value = next((loss for loss in gathered(loss_value) if not _finite(loss)), loss_value)
        lost = not _finite(loss_value)
        if not lost and overflowed and self.scaled and self.overflows < SEARCH_STEPS:
            self.overflows += 1
            return
        if lost or overflowed:
            what = f"the loss is {loss_value}" if lost else f"the gradient norm is {norm_value}"
            if overflowed and self.overflows:
                what += f" for the {self.overflows + 1}th step in a row, whatever the scale (fp16; bf16 has its range)"
            # a loss that is not finite with gradients that are is this rank's alone
            again = forward if overflowed or not together else None
            self._refuse(step, what, again, all_know=overflowed)
        self.overflows = 0
        if norm is not None and loss_value > 0:
            self.first_gradients.check(step, self.batches)

    def _refuse(self, step: int, what: str, forward: Callable[..., Any] | None, *, all_know: bool) -> NoReturn:
        """Raise with what is found: by all ranks together where `all_know`, else by this one alone."""
        share: Callable[[Any], list[Any]] = gathered if all_know else lambda mine: [mine]
        found = self._found(forward, share)
        error = TrainingError(f"step {step:,}: {what}{found}; {self._advice(step)}")
        if all_know:
            all_raise(error)
        raise error

    def _found(self, forward: Callable[..., Any] | None, share: Callable[[Any], list[Any]]) -> str:
        """`; first in llm.layers.3 ...; its rows: a.json records 4, 9`; those who share run the same micro-batches."""
        own = [number for number, loss in enumerate(self.losses) if not _finite(float(loss))]
        lost = sorted({number for bad in share(own) for number in bad})[:1]
        count = min(share(len(self.batches)))
        suspects = [number for number in lost if number < count] or list(range(count))
        mine, found = "", [""]
        if forward is not None:
            for number in suspects:
                mine = first_bad_module(self.model, forward, self.batches[number], gradients=not lost)
                found = share(mine)
                if any(found):
                    suspects = [number]
                    break
        where = next(filter(None, found), "")
        concerned = bool(mine) or any(number in own for number in suspects) or not (lost or where)
        origins = [origin for number in suspects for origin in self.batches[number].get(ORIGINS, ()) if concerned]
        rows = rows_of([{ORIGINS: part} for part in share(origins)])
        return (f"; {where}" if where else "") + (f"; its rows: {rows}" if rows else "")

    def _advice(self, step: int) -> str:
        if step == 1:  # the weights are those the run began with
            return (
                "no weight has been updated yet, so no lower optim.lr helps; look at these records and at what the run "
                "starts from, or use precision bf16 or fp32"
            )
        good = next(filter(_is_good, checkpoints(self.folder)), None)
        before = f"the last checkpoint with finite weights is {good}" if good else "there is no checkpoint before it"
        return f"{before}; look at these records, lower optim.lr or optim.max_grad_norm, or use precision bf16 or fp32"


def first_bad_module(
    model: LlavaModel, forward: Callable[..., Any], batch: Mapping[str, Any], *, gradients: bool
) -> str:
    """Run a micro-batch once more and say where the first number that is not finite comes out; empty if nowhere."""
    found: list[str] = []

    def of_plugin(name: str) -> str:
        maker = model.made_by.get(name.partition(".")[0])
        return f" of {maker}" if maker else ""

    def watch(name: str, part: nn.Module) -> Callable[..., None]:
        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not found and not bool(torch.isfinite(tensor).all()):
                    broken = [n for n, p in part.named_parameters() if not bool(torch.isfinite(_held(p)).all())]
                    why = f"; its own weight {broken[0]} is not finite" if broken else ""
                    found.append(f"first in the output of {name} ({type(part).__name__}){of_plugin(name)}{why}")
                if gradients and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: told(name, part, gradient))  # type: ignore[no-untyped-call]

        return after

    def told(name: str, part: nn.Module, gradient: Tensor) -> None:
        if not found and not bool(torch.isfinite(gradient).all()):
            where = f"{name} ({type(part).__name__}){of_plugin(name)}"
            found.append(f"first in the gradient that reaches the output of {where}")

    hooks = [part.register_forward_hook(watch(name, part)) for name, part in model.named_modules() if name]
    tensors = {key: value.to(model.device) for key, value in batch.items() if isinstance(value, Tensor)}
    try:
        with torch.set_grad_enabled(gradients):
            loss = forward(**tensors)["loss"]
            if gradients:
                model.zero_grad()
                loss.backward()
        if not found and not _finite(float(loss.detach())):
            found.append("first in the loss itself, every module's output is finite")
        return found[0] if found else ""
    except RuntimeError as error:  # the search must not hide what it searches for
        log.warning("the search for the module ended early: %s", error)
        return found[0] if found else ""
    finally:
        for hook in hooks:
            hook.remove()


def rows_of(batches: Sequence[Mapping[str, Any]]) -> str:
    """`a.json records 4, 9; b.json record 1`: where the samples of some micro-batches came from."""
    listed: dict[str, list[int]] = {}
    for batch in batches:
        for source, record, _ in batch.get(ORIGINS, ()):
            listed.setdefault(source, []).append(record)
    texts = []
    for source, records in listed.items():
        shown = ", ".join(f"{record:,}" for record in records[:ROWS_SHOWN])
        more = f" and {len(records) - ROWS_SHOWN:,} more" if len(records) > ROWS_SHOWN else ""
        texts.append(f"{source} record{'s' if len(records) > 1 else ''} {shown}{more}")
    return ", ".join(texts)


class FirstGradients:
    """Whether each part that is to be trained gets a gradient at all, in the first step that concerns it.

    One gradient of a part that is not zero is enough: that of `lora_A` is zero at first, because `lora_B` is. Encoder
    and projector are asked at the first step with a target after a picture. Hooks see gradients under engines that
    keep them elsewhere (DeepSpeed), `.grad` under those that replace the parameters (FSDP).
    """

    def __init__(self, model: LlavaModel) -> None:
        self.model = model
        self.touched: dict[str, Tensor | None] = {}
        self._hooks: dict[str, list[Any]] = {}
        for part, module in model.parts().items():
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            if trained:
                self.touched[part] = None
                self._hooks[part] = [parameter.register_hook(self._note(part)) for parameter in trained]  # type: ignore[no-untyped-call]

    def _note(self, part: str) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            any_of_it, before = (gradient != 0).any(), self.touched.get(part)
            self.touched[part] = any_of_it if before is None else before | any_of_it.to(before.device)

        return note

    def check(self, step: int, batches: Sequence[Mapping[str, Any]]) -> None:
        """Raises `TrainingError` for a part that should have learnt something in this step and has not."""
        if not self.touched:
            return
        image_id = self.model.image_id
        pictures = image_id is not None and any(teaches_pictures(batch, image_id) for batch in batches)
        for part in list(self.touched):
            noted = self.touched[part]
            if part != "llm" and not pictures:
                self.touched[part] = None
                continue
            grads = [p.grad for p in getattr(self.model, part).parameters() if p.requires_grad and p.grad is not None]
            if not (noted is not None and bool(noted)) and not any(bool((grad != 0).any()) for grad in grads):
                what = "no gradient at all" if noted is None and not grads else "only zeros as gradients"
                raise TrainingError(
                    f"step {step:,}: {part} is to be trained and got {what}; what the loss depends on does not pass "
                    f"through it: freeze {part} in the config, or mend what cuts it off (a detach, a frozen call)"
                )
            for hook in self._hooks.pop(part):
                hook.remove()
            del self.touched[part]


def teaches_pictures(batch: Mapping[str, Any], image_id: int) -> bool:
    """Whether a micro-batch has a target that stands after a picture of the same sample."""
    is_image, positions = batch["input_ids"] == image_id, batch.get("position_ids")
    images = is_image.long().cumsum(1)
    before_sample = torch.zeros_like(images)
    if positions is not None:  # flat: what stood in the row before this sample began does not count
        before_sample = ((images - is_image.long()) * (positions == 0)).cummax(1).values
    return bool(((batch["labels"] != IGNORE_INDEX) & (images > before_sample)).any())


def _is_good(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole and every weight in it is finite: a save may have come between cause and effect."""
    if not (checkpoint / MANIFEST).is_file():
        return False
    for path in checkpoint.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if not all(bool(torch.isfinite(file.get_tensor(name)).all()) for name in file.keys()):  # noqa: SIM118
                return False
    return True


def _tensors(output: Any) -> list[Tensor]:
    """The floating point tensors in a module's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _held(parameter: Tensor) -> Tensor:
    """What this rank has of a weight: to put shards together all ranks would have to ask at once."""
    local: Tensor = getattr(parameter, "to_local", lambda: parameter)()
    return local


def _finite(value: float) -> bool:
    return value - value == 0.0
