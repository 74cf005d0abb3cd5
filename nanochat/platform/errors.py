"""Errors that a user can fix. The command line prints them as one line and exits with their status."""

GET_DATA = "generate the embedded data with: nanochat data generate, or fetch the real data with: nanochat fetch"


class UserError(Exception):
    """Bad input, or something missing; the message says what was found, what was expected and what to do."""

    exit_status = 1


class TrainingStopped(UserError):
    """Training was stopped by a signal, after everything was saved."""

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status
