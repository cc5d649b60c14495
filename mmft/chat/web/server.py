"""The server of the page: its address, who may come in, how much may be sent, and where uploads lie."""

import logging
import os
import signal
import socket
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmft.chat.address import LOCAL, take_address
from mmft.chat.loading import ModelChoice, load_choice
from mmft.chat.tools import toolbox
from mmft.chat.web.look import CSS
from mmft.chat.web.options import PageOptions, ServeOptions, logins, short_names
from mmft.chat.web.turns import Seat
from mmft.chat.web.uploads import PICTURES, UploadBound
from mmft.errors import MmftError
from mmft.plugins import Plugins

log = logging.getLogger("mmft")


def load_seats(choice: ModelChoice, compare: str | None, tools: Sequence[str], plugins: Plugins) -> list[Seat]:
    """The model, and the one it is compared with, each by a short name and with the tools of these names."""
    loaded = [load_choice(choice, plugins)]
    if compare is not None:
        other = ModelChoice(model=compare, device=choice.device, dtype=choice.dtype, bits=choice.bits)
        loaded.append(load_choice(other, plugins))
    names = short_names([name for name, _ in loaded])
    assistants = [assistant for _, assistant in loaded]
    boxes = [toolbox(tools, plugins, assistant.template) for assistant in assistants]
    for tool, reason in boxes[0].left_out.items():
        log.warning("tool %r is left out: %s", tool, reason)
    return [Seat(*parts) for parts in zip(names, assistants, boxes, strict=True)]


def bind(options: ServeOptions) -> socket.socket:
    """The address of the page, and `MmftError` for what would go wrong, before a model is loaded."""
    if find_spec("gradio") is None:
        raise MmftError('the page needs gradio; run: pip install "mmft[web]"')
    logins(options.auth)
    return take_address(options.host, options.port)


def serve(seats: Sequence[Seat], page: PageOptions, options: ServeOptions, bound: socket.socket) -> None:
    """Serve the page until Ctrl-C. Uploads live in a folder of this server and are deleted with it.

    Raises `MmftError` where the page cannot be opened at the address of `bind`, which is given up.
    """
    if options.host not in LOCAL and not options.auth:
        log.warning("%s: everybody who reaches this machine can use the page; --auth asks for a password", options.host)
    with tempfile.TemporaryDirectory(prefix="mmft-web-") as uploads, bound:
        _prepare_process(uploads, options.host)
        from mmft.chat.web.page import build_page

        blocks = build_page(seats, page)
        local, public = launch(blocks, options, bound, page.examples)
        if options.share and not public:
            log.warning("no public address: gradio could not reach its relay; the page is open on this machine only")
        print(f"open {public or local} (Ctrl-C ends)", flush=True)  # noqa: T201
        blocks.block_thread()


def launch(
    page: Any, options: ServeOptions, bound: socket.socket, files: Sequence[Path] = ()
) -> tuple[str, str | None]:
    """Start gradio's server beside this thread: the page's address here, and its public one.

    Gradio 6.31 takes no socket, so `bound` is closed and its port bound anew. Of all files outside its own folder it
    serves `files` only. Raises `MmftError` where it does not start.
    """
    import gradio as gr

    from mmft.chat.web.page import words

    port, host = bound.getsockname()[1], f"[{options.host}]" if ":" in options.host else options.host
    bound.close()
    try:
        _, local, public = page.launch(
            server_name=host, server_port=port, share=options.share, quiet=True, prevent_thread_lock=True,
            auth=logins(options.auth) or None, max_file_size=options.max_upload * 1_000_000, run_history=False,
            ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False, footer_links=[], css=CSS,
            i18n=words(), show_error=True, allowed_paths=[str(file.absolute()) for file in files],
            theme=gr.themes.Default(font=["system-ui", "sans-serif"]), app_kwargs={"middleware": [_bound(options)]},
        )  # fmt: skip
    except Exception as error:  # of many kinds: OSError, ValueError, those of httpx, and plain ones
        page.close()
        take_address(options.host, port).close()  # gradio's own message speaks of a range of ports, whatever the cause
        raise MmftError(f"cannot serve on {host}:{port}: {' '.join(str(error).split())}") from error
    return local, public


def _bound(options: ServeOptions) -> Any:
    """The total of all uploads, in gradio's folder for them."""
    from gradio.utils import get_upload_folder
    from starlette.middleware import Middleware

    limit = PICTURES * options.max_upload * 1_000_000
    return Middleware(UploadBound, folder=Path(get_upload_folder()), limit=limit)


def _prepare_process(uploads: str, host: str) -> None:
    """What gradio takes from the environment alone, when imported; and a SIGTERM that ends as cleanly as Ctrl-C."""
    os.environ["GRADIO_TEMP_DIR"] = uploads  # else /tmp/gradio, which belongs to the first user of a machine
    local = ",".join(filter(None, (os.environ.get("no_proxy"), "localhost", "127.0.0.1", host)))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = local  # gradio calls its own server once, through a proxy if set
    signal.signal(signal.SIGTERM, signal.default_int_handler)
