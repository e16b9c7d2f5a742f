import subprocess
import sys

import pytest


@pytest.mark.parametrize("missing", ["sklearn", "scipy"])
def test_what_is_missing_is_named_with_the_extra_that_brings_it(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import fastdis.spectral"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        "ImportError: fastdis.spectral needs scikit-learn and SciPy: pip install 'fastdis[spectral]'" in result.stderr
    )
