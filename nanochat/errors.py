"""The errors a user can mend. The command line prints them in one line and exits with their status."""


class UserError(Exception):
    """Bad input or a missing piece: says what was found, what was wanted and what to do."""

    exit_status = 1


class TrainingStopped(UserError):
    """Training ended early on purpose (a signal); everything is saved."""

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status
