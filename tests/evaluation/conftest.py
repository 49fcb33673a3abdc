"""What tests of evaluations share."""

from tests.launch.conftest import runs  # noqa: F401  (a fixture)
