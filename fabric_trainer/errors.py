"""The errors that a user can mend, and the codes a process ends with."""

FINISHED, FAILED, INPUT = 0, 1, 2
TRY_AGAIN = 75  # stopped by SIGTERM or SIGUSR1, after saving (EX_TEMPFAIL of sysexits.h)
SMALLER = 76  # out of memory: to be started again, with smaller micro-batches
INTERRUPTED = 130  # stopped by SIGINT, after saving


class InputError(ValueError):
    """Wrong input: one line that names what was wrong and what would be right. The process ends with code 2."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; what was on disk before is untouched."""


class BadGradientError(RuntimeError):
    """A gradient was not finite, and the policy or its budget says stop."""


class CompileError(RuntimeError):
    """A compiler failed, and ``compile.require`` forbids to go on without."""


class OutOfMemoryRestart(RuntimeError):
    """Out of memory where the job has to begin again, with smaller micro-batches. The process ends with code 76."""
