import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_folder():
    """Folder of data that is not part of the project, or None."""
    path = os.environ.get("LAZYATTN_TEST_DATA")
    return Path(path) if path and Path(path).is_dir() else None
