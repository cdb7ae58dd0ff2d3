"""`python -m fastlm` and the `fastlm` command."""

import os
import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log lines, before torch is loaded
    try:
        from fastlm.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit(f"fastlm: the command line needs {error.name}: pip install 'fastlm[cli]'")
    app()


if __name__ == "__main__":
    main()
