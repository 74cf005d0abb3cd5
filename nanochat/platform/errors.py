"""Errors that a user can fix. The command line prints them as one line and exits with their status."""

import errno

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Bad input, or something missing; the message says what was found, what was expected and what to do."""

    exit_status = 1


class TrainingStopped(UserError):
    """Training was stopped by a signal, after everything was saved."""

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status


def remedy_for(error: OSError) -> str:
    """What a user can do about an error of the operating system that concerns a file or directory."""
    if error.errno in NO_SPACE:
        return "free some space"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "check the path and its permissions"
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY):
        return "move away what is there, or choose another path"
    if error.errno in (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP):
        return "check the path"
    return "check the path and its disk"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is used up; torch has a class of its own for GPUs alone."""
    names = {kind.__name__ for kind in type(error).__mro__}
    texts = ("DefaultCPUAllocator", "Storage size calculation overflowed")
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or any(text in str(error) for text in texts)
