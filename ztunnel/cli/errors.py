"""The one error the command shows to its user: what is wrong with which object, and what would help."""


class UserError(Exception):
    """Something the user can put right; shown as `error: MESSAGE; REMEDY` on stderr, without a traceback.

    `message` names the object and what is wrong with it, `remedy` what to do about it, `detail` holds further
    lines that explain it (the end of a log), `code` is the exit code.
    """

    def __init__(self, message: str, remedy: str = "", *, detail: str = "", code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.detail = detail
        self.code = code

    def __str__(self) -> str:
        text = f"{self.message}; {self.remedy}" if self.remedy else self.message
        return f"{text}\n{self.detail}" if self.detail else text
