"""Where a server of this machine listens: taken before a model is loaded, so that a wrong address fails at once."""

import os
import socket

from mmft.errors import MmftError

LOCAL = ("127.0.0.1", "localhost", "::1")


def take_address(host: str, port: int) -> socket.socket:
    """A socket that has the address, a free port for 0. It does not listen yet, so nobody waits for the model.

    Raises `MmftError` where the address cannot be used.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise MmftError(unusable(host, port, error)) from error
    return bound


def unusable(host: str, port: int, error: Exception) -> str:
    """The line for an address that cannot be used, whenever that is found."""
    number = getattr(error, "errno", None)
    reason = os.strerror(number) if number and number > 0 else str(error)
    return f"cannot serve on {host}:{port}: {reason}; give another --port or --host"
