"""A warning that no test expects is an error, those of pyproject.toml's list apart."""

import warnings

import pytest


@pytest.mark.parametrize("kind", [UserWarning, DeprecationWarning, RuntimeWarning, FutureWarning, ResourceWarning])
def test_a_warning_is_an_error(kind: type[Warning]) -> None:
    with pytest.raises(kind, match="nobody expects this"):
        warnings.warn("nobody expects this", kind, stacklevel=1)
    with pytest.raises(RuntimeWarning, match="overflow"):
        warnings.warn("overflow encountered in exp2", RuntimeWarning, stacklevel=1)  # only the interpreter's is let be
