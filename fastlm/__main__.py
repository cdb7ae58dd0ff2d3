"""`python -m fastlm` and the `fastlm` command."""

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from fastlm.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit(f"fastlm: the command line needs {error.name}: pip install 'fastlm[cli]'")
    app()


if __name__ == "__main__":
    main()
