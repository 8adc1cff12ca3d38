"""Silence for transformers' progress bars and load-time warnings, which would tear our own progress display apart.

Called as `with quiet(): model = AutoModelForCausalLM.from_pretrained(...)`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no warnings from transformers inside; errors still show, and the user's settings come back afterwards."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
