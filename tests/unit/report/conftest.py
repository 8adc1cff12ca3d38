"""The studies that the report's tests share; `builder` writes them."""

from pathlib import Path

import pytest

from .builder import SMALL, Study, StudySpec, build_study

UNFINISHED = (("direct", 20), ("chain", 10), ("chain", 20))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Three arms (a chain and its equal-compute twin among them), two seeds, two sets; for tests that change its files."""
    return build_study(tmp_path, StudySpec(SMALL))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The same, built and read once: for tests that change nothing but the reports that they write."""
    return build_study(tmp_path_factory.mktemp("shared"), StudySpec(SMALL))


@pytest.fixture(scope="session")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The same with one seed of an arm and one whole arm still to be evaluated; shared too."""
    return build_study(tmp_path_factory.mktemp("unfinished"), StudySpec(SMALL, unfinished=UNFINISHED))
