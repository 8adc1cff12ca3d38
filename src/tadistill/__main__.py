"""`tadistill` and `python -m tadistill`, the command line."""

from tadistill.runner.interruption import end_at_once


def main() -> None:
    """Run the command line. A signal ends it with one word also during the imports."""
    end_at_once()
    from tadistill import cli

    cli.main()


if __name__ == "__main__":
    main()
