"""The errors that a user can fix. The command line prints them in one line and exits with their status."""

GET_DATA = "generate the embedded data with: nanochat data generate, or fetch the real data with: nanochat fetch"


class UserError(Exception):
    """Bad input or a missing piece: says what was found, what was wanted and what to do."""

    exit_status = 1


class TrainingStopped(UserError):
    """Training ended early on purpose (a signal); everything is saved."""

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status
