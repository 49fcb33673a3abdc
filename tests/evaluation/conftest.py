"""What tests of evaluations share."""

from tests.launch.conftest import runs, words  # noqa: F401  (a fixture)
