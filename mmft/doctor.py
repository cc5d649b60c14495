"""Is this machine in order? `mmft doctor`: what mmft needs, what it can use, and a remedy for each problem.

Each check is a function that yields findings. What is broken and needed makes the command fail (exit code 1); what is
merely missing is a note. Versions are held against the bounds in mmft's own package metadata: there is no second list.
"""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from packaging.requirements import Requirement
from packaging.version import Version

from mmft.errors import MmftError
from mmft.plugins import Plugins

Level = Literal["ok", "note", "problem"]
GIB = 2**30
LOW_DISK = 5 * GIB  # a 1B model's checkpoints with its optimizer; one of 7B needs more
LOW_MEMORY = 4 * GIB
PATIENCE = 5.0  # seconds that the hub has for an answer
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "HF_HOME")


@dataclass(frozen=True)
class Finding:
    """One line: `problem` is broken and needed, `note` may matter, `ok` is fine. A problem always has a remedy."""

    name: str
    level: Level
    what: str
    remedy: str = ""


def examine(plugins: Plugins, *, work_dir: Path = Path("work_dirs"), low_disk: int = LOW_DISK) -> list[Finding]:
    """Run every check. One that fails in a way nobody thought of is a problem itself, not the end of the command."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        packages, torchvision, gpu, quantization, attention, deepspeed,
        lambda: disk(work_dir, low_disk), memory, environment, lambda: broken_plugins(plugins),
    ]  # fmt: skip
    found: list[Finding] = []
    for check in checks:
        try:
            found += check()
        except Exception as error:
            name = getattr(check, "__name__", "check")
            reason = f"the check itself failed: {type(error).__name__}: {_first(error)}"
            found.append(Finding(name, "problem", reason, "please report this line"))
    return found


def packages() -> Iterator[Finding]:
    """Python and each package of mmft's metadata: needed ones must be there, optional ones fit where they are."""
    yield Finding("python", "ok", sys.version.split()[0])
    try:
        listed = [Requirement(line) for line in requires("mmft") or ()]
    except PackageNotFoundError:
        yield Finding("mmft", "problem", "not installed as a package", "pip install -e . in its folder")
        return
    sizes = Counter(map(_extra, listed))
    wanted: dict[str, list[Requirement]] = {}
    for requirement in listed:
        if _extra(requirement) != "dev":
            wanted.setdefault(requirement.name, []).append(requirement)
    for wishes in wanted.values():
        extras = sorted(set(map(_extra, wishes)), key=lambda extra: (sizes[extra], extra))
        yield from _package(wishes[0], [] if "" in extras else extras)


def _extra(requirement: Requirement) -> str:
    """The extra a requirement belongs to; an empty string where mmft always needs it."""
    marker = str(requirement.marker or "")
    return marker.split("extra ==")[1].strip().strip("\"'") if "extra ==" in marker else ""


def _package(requirement: Requirement, extras: list[str]) -> Iterator[Finding]:
    """One package; `extras` are those that need it, the one with the fewest packages first, none where mmft does."""
    name, bounds = requirement.name, str(requirement.specifier) or "any version"
    install = f"pip install '{name}{requirement.specifier}'"
    try:
        installed = Version(version(name))
    except PackageNotFoundError:
        if extras:
            needed = ", ".join(f"mmft[{extra}]" for extra in extras)
            yield Finding(name, "note", f"not installed; only needed for {needed}", f"pip install 'mmft[{extras[0]}]'")
        else:
            yield Finding(name, "problem", f"not installed; mmft needs {bounds}", install)
        return
    if not requirement.specifier.contains(installed, prereleases=True):
        level: Level = "note" if extras else "problem"
        yield Finding(name, level, f"{installed} is outside of what was tested: {bounds}", install)
    else:
        yield Finding(name, "ok", f"{installed} ({bounds})")


def torchvision() -> Iterator[Finding]:
    """mmft does without it, but one built for another torch takes transformers' classes down with it."""
    if find_spec("torchvision") is None:
        yield Finding("torchvision", "ok", "not installed, and not needed")
        return
    import torch

    try:
        found = import_module("torchvision")
    except Exception as error:
        build = torch.__version__
        yield Finding(
            "torchvision",
            "problem",
            f"cannot be imported beside torch {build}, and transformers then fails too: {_first(error)}",
            "pip uninstall torchvision (mmft does without), or install the build that belongs to this torch",
        )
    else:
        yield Finding("torchvision", "ok", str(found.__version__))


def gpu() -> Iterator[Finding]:
    """The cards, and whether torch was built for the driver that is here."""
    import torch

    built = torch.version.cuda
    driver = _nvidia_smi()
    if not torch.cuda.is_available():
        if driver:
            what = f"a driver {driver} is here, but torch {torch.__version__} cannot use it (built for CUDA {built})"
            yield Finding("gpu", "problem", what, "install a torch built for CUDA, not newer than the driver allows")
        else:
            yield Finding(
                "gpu",
                "note",
                "none found; training runs on the CPU",
                "slow for more than a small model; a machine with an NVIDIA card is faster",
            )
        return
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if card.major >= 8 else "fp16 only"
        what = f"{card.name}, {card.total_memory / GIB:.1f} GiB, capability {card.major}.{card.minor}, {bf16}"
        yield Finding(f"gpu {number}", "ok", f"{what}; torch for CUDA {built}, driver {driver or 'not told'}")


def _nvidia_smi() -> str:
    """The driver's version; an empty string where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def quantization() -> Iterator[Finding]:
    """bitsandbytes really quantises a weight, multiplies with it and gives a gradient."""
    if find_spec("bitsandbytes") is None:
        return  # told with the packages
    import torch

    remedy = "reinstall bitsandbytes for this torch and CUDA; without it use model.llm.quantization='none'"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        error = _four_bit_error(torch, device)
    except Exception as failure:
        yield Finding("bitsandbytes 4-bit", "problem", f"does not work on {device}: {_first(failure)}", remedy)
        return
    if error > 0.2:  # nf4 of normal weights loses about 0.09 of a product's size
        yield Finding("bitsandbytes 4-bit", "problem", f"a product on {device} is wrong by {error:.0%}", remedy)
    else:
        yield Finding("bitsandbytes 4-bit", "ok", f"quantises and multiplies on {device} (nf4 differs by {error:.1%})")


def _four_bit_error(torch: Any, device: str) -> float:
    """The relative error of one 4-bit product. Raises where nothing comes back through it."""
    import bitsandbytes as bnb

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    layer = layer.to(device)
    x = torch.randn(8, 128, generator=generator).to(device).requires_grad_()
    result = layer(x)
    result.sum().backward()
    if x.grad is None or not bool(x.grad.abs().sum()):
        raise RuntimeError("no gradient comes back through a 4-bit layer")
    exact = x.detach().cpu() @ weight.t()
    return float((result.detach().cpu() - exact).norm() / exact.norm())


def attention() -> Iterator[Finding]:
    """Which attention keeps packed samples apart, and how fast."""
    import torch

    if not torch.cuda.is_available():
        yield Finding("attention", "ok", "torch's SDPA, sample by sample (the kernels for packed rows are for CUDA)")
        return
    if find_spec("flash_attn") is not None:
        try:
            import_module("flash_attn")
        except Exception as error:
            remedy = "pip uninstall flash-attn, or build it against this torch"
            yield Finding("attention", "problem", f"flash-attn cannot be imported: {_first(error)}", remedy)
        else:
            yield Finding("attention", "ok", "flash-attn")
    elif find_spec("torch.nn.attention.varlen") is not None:
        yield Finding("attention", "ok", "torch's own variable-length kernel")
    else:
        yield Finding(
            "attention", "note", "SDPA, sample by sample", "torch>=2.12 or flash-attn is faster for packed rows"
        )


def deepspeed() -> Iterator[Finding]:
    """Importable, and with a compiler for the operators it builds at the first run."""
    if find_spec("deepspeed") is None:
        return
    try:
        import_module("deepspeed")
    except Exception as error:
        yield Finding(
            "deepspeed", "problem", f"cannot be imported: {_first(error)}", "reinstall or uninstall deepspeed"
        )
        return
    missing = [tool for tool, names in (("a C++ compiler", ("c++", "g++", "clang++")), ("ninja", ("ninja",)))
               if not any(map(shutil.which, names)) and find_spec(tool) is None]  # fmt: skip
    if missing:
        what = f"works, but {' and '.join(missing)} to build its operators is not here"
        yield Finding("deepspeed build", "note", what, "install g++ and ninja; offload and CPU runs need them")
    else:
        yield Finding("deepspeed build", "ok", "importable, compiler and ninja are here")


def disk(work_dir: Path, low: int) -> Iterator[Finding]:
    """Space where runs are written and where models are kept."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for name, folder in (("disk of runs", work_dir), ("disk of models", cache)):
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(there).free
        what = f"{free / GIB:.1f} GiB free at {there}"
        if not os.access(there, os.W_OK):
            yield Finding(name, "problem", f"{there} cannot be written", "choose another: --work-dir, or HF_HOME")
        elif free < low:
            yield Finding(name, "problem", f"{what}, less than {low / GIB:g} GiB", "free some, or choose another disk")
        else:
            yield Finding(name, "ok", what)


def memory() -> Iterator[Finding]:
    """RAM: all, and what is left now."""
    size = os.sysconf("SC_PAGE_SIZE")
    total, free = size * os.sysconf("SC_PHYS_PAGES"), size * os.sysconf("SC_AVPHYS_PAGES")
    what = f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB unused"
    if total < LOW_MEMORY:
        yield Finding("memory", "note", what, "models are loaded through RAM; see what one needs with mmft plan")
    else:
        yield Finding("memory", "ok", what)


def environment() -> Iterator[Finding]:
    """Variables that decide whether and where models are looked for."""
    found = [f"{name}={os.environ[name]}" for name in OFFLINE if os.environ.get(name)]
    offline = any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE[:3])
    if offline:
        yield Finding("hub", "note", f"offline: {', '.join(found)}", "unset it to fetch models by name")
        return
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    told = f" ({', '.join(found)})" if found else ""
    if why := _unreached(url):
        remedy = "give models as folders, set HF_ENDPOINT to a mirror that is reached, or model.hub='modelscope'"
        yield Finding("hub", "note", f"{url} is not reached: {why}{told}; models cannot be fetched by name", remedy)
    else:
        yield Finding("hub", "ok", f"{url} answers{told}")


def _unreached(url: str) -> str:
    """Why a server does not answer; an empty string where it does, whatever it says. Asked for a few seconds only."""
    found = [f"no answer in {PATIENCE:g} seconds"]

    def ask() -> None:
        try:
            with urlopen(Request(url, method="HEAD"), timeout=PATIENCE):
                found[:] = [""]
        except HTTPError:  # it answers, if not to us
            found[:] = [""]
        except (OSError, ValueError, HTTPException) as error:
            found[:] = [_first(error)]

    asking = Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
    asking.start()
    asking.join(PATIENCE)
    return found[0]


def broken_plugins(plugins: Plugins) -> Iterator[Finding]:
    """Each plugin that did not load, with its reason."""
    yield Finding("plugins", "ok", f"{len(plugins.plugins) - len(plugins.broken)} loaded")
    for plugin in plugins.broken:
        remedy = f"mend or uninstall {plugin.distribution or plugin.name}"
        yield Finding(f"plugin {plugin.name}", "problem", f"did not load: {plugin.error}", remedy)


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines() if not isinstance(error, MmftError) else [str(error)]
    return lines[0] if lines else type(error).__name__


def lines_of(findings: list[Finding]) -> Iterator[str]:
    """A line for each finding, its remedy under it, and what it comes to."""
    marks = {"ok": "ok  ", "note": "note", "problem": "BAD "}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        yield f"{marks[finding.level]}  {finding.name.ljust(width)}  {finding.what}"
        if finding.remedy and finding.level != "ok":
            yield f"{' ' * (width + 8)}-> {finding.remedy}"
    problems = sum(finding.level == "problem" for finding in findings)
    yield f"{problems} problem{'s' * (problems != 1)}" if problems else "everything mmft needs is in order"
