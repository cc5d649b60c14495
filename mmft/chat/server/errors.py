"""What the server refuses, in the form of OpenAI's errors."""

from typing import Any

from mmft.errors import MmftError

TYPES = {401: "authentication_error", 403: "permission_error", 413: "invalid_request_error", 503: "overloaded_error"}


class Refused(MmftError):
    """A request that is not answered: its HTTP status, the field that is to blame, and a code for programs."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def __reduce__(self) -> tuple[Any, ...]:
        return _refused, (self.message, self.status, self.param, self.code)

    @property
    def body(self) -> dict[str, Any]:
        """What OpenAI's clients read."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _refused(message: str, status: int, param: str | None, code: str | None) -> Refused:
    return Refused(message, status=status, param=param, code=code)
